// Pieces of JSON that completions and chats share.
#pragma once

#include <cstdint>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/choice.h"
#include "gateway/openai/json_writer.h"

namespace fathom {

// "finish_reason": null while the choice goes on.
void WriteFinishReason(const ChoiceDelta& delta, JsonWriter& json);

// "stop_reason": null, the stop string, or the stop token's id.
void WriteStopReason(const ChoiceDelta& delta, JsonWriter& json);

// A list, or null when there is none.
void WriteTokenIds(const std::vector<uint32_t>* token_ids, JsonWriter& json);

// {"prompt_tokens","total_tokens","completion_tokens"}, as in chunks on the way.
void WriteUsage(const TokenUsage& usage, JsonWriter& json);

// The same with "prompt_tokens_details":{"cached_tokens"}, as in whole responses and last chunks.
void WriteUsageWithDetails(const TokenUsage& usage, JsonWriter& json);

}  // namespace fathom
