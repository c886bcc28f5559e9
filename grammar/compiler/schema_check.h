// Whether a JSON Schema says only what xgrammar enforces.
//
// xgrammar leaves out what it does not know, without a word, and the answer would then not be what
// was asked for. So whatever would be left out is refused, by name and place: keywords it does not
// have (`not`, `if`, `contains`, `uniqueItems`, …), keywords beside one that it looks at alone
// (`$ref`, `const`, `enum`, `anyOf`, `oneOf`, `allOf`), keywords of a type that is not named, names
// of properties that several keywords speak of, references out of the schema. What it warns of
// itself is refused in token_grammar.h. Annotations and unknown keywords say nothing about an
// instance; they are allowed, and so is an unknown `format`.
//
// Four things are stricter than the schema says, as in vLLM: properties come in the schema's order;
// objects and arrays have no properties and items that the schema does not name, unless it says
// additionalProperties or items; a pattern matches the whole of a string; and strings whose
// characters are counted or matched escape none. (Counting `[^"\\]` alone is quick: with escapes a
// mask took 28 ms in the mean instead of 0.9.)
//
// One thing is laxer: beside additionalProperties, a name of `properties` can come again if it is
// written with escapes, which a model does only if it is made to.
//
// Source: JSON Schema 2020-12; xgrammar 0.2.9, cpp/json_schema_converter.cc, class SchemaParser.
#pragma once

#include <cstddef>
#include <string_view>

#include "absl/status/status.h"

namespace fathom {

inline constexpr size_t kMaxSchemaDepth = 64;
inline constexpr size_t kMaxEnumValues = 2048;

// InvalidArgument says what and where, as a JSON pointer. Thread-safe.
absl::Status CheckSchema(std::string_view schema);

// The same of every schema in a structural tag. InvalidArgument also for schemas that are written
// in another way than as JSON (`style`).
absl::Status CheckStructuralTag(std::string_view tag);

}  // namespace fathom
