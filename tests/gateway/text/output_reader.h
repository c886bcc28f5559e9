// Reads a model's output for the tests of its parsers, from token ids that arrive in chunks.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "gateway/text/message_delta.h"
#include "gateway/text/output_parser.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

// The token ids of one output, cut.
using Chunks = std::vector<std::vector<uint32_t>>;

Chunks OneChunk(const std::vector<uint32_t>& ids);
Chunks SingleTokens(const std::vector<uint32_t>& ids);
Chunks RandomChunks(const std::vector<uint32_t>& ids, std::mt19937_64& random);

// The message that the chunks make: their deltas joined.
MessageDelta ReadOutput(const Tokenizer& tokenizer, const OutputParserOptions& options,
                        const Chunks& chunks);

// For messages of tests: everything in it.
std::string Shown(const MessageDelta& message);

}  // namespace fathom
