// What a request says its output must look like: response_format, structured_outputs and the older
// guided_json, guided_regex, guided_choice and guided_grammar.
//
// | response_format         | becomes                                                     |
// | {"type": "text"}        | nothing                                                     |
// | {"type": "json_object"} | the schema {"type": "object"}                               |
// | {"type": "json_schema"} | json_schema.schema; `strict` or not, it is kept to          |
// | structured_outputs, guided_…                                                          |
// | json                    | the schema, an object or its text                           |
// | regex, grammar          | as they are; a grammar is xgrammar's EBNF with a rule `root` |
// | choice                  | one of these strings                                        |
// | json_object: true       | the schema {"type": "object"}                               |
//
// Only the form is checked here; what the grammar says is judged where it is compiled
// (grammar/compiler), and refused with a 400 from there.
// Source: vllm/sampling_params.py, class StructuredOutputsParams; entrypoints/openai/…/protocol.py
// (0.16).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gateway/openai/json_fields.h"
#include "proto/sampling.pb.h"

namespace fathom {

// As in proto/sampling.proto.
inline constexpr size_t kMaxGrammarBytes = size_t{64} << 10;

struct StructuredOutput {
  v1::Grammar grammar;
  std::string param;  // the field that it comes from; answer.cc names it when it is refused
};

// nullopt when nothing is asked. Refuses more than one wish, and fields of vLLM's that would change
// the output and are not there (whitespace_pattern, structural_tag).
absl::StatusOr<std::optional<StructuredOutput>> ReadStructuredOutput(const JsonFields& fields);

// Of /v1/responses: response_format's words, with the schema beside its type. `output` may hold
// what ReadStructuredOutput found, which is one wish already.
absl::Status AddTextFormat(const JsonFields& text_format, std::optional<StructuredOutput>& output);

// One of these strings, as rules in EBNF.
std::string GrammarOfChoices(absl::Span<const std::string> choices);

// The same, or first thoughts: the token `think`, others that are not `no_thoughts`, the token
// `think_end`. A schema or a tag that is no JSON stays as it is, and is refused where it is
// compiled.
v1::Grammar MayThinkFirst(const v1::Grammar& grammar, uint32_t think, uint32_t think_end,
                          absl::Span<const uint32_t> no_thoughts);

}  // namespace fathom
