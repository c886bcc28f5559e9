#include "tests/gateway/text/output_reader.h"

#include "gateway/text/detokenizer.h"

namespace fathom {

Chunks OneChunk(const std::vector<uint32_t>& ids) { return {ids}; }

Chunks SingleTokens(const std::vector<uint32_t>& ids) {
  Chunks chunks;
  for (const uint32_t id : ids) chunks.push_back({id});
  return chunks;
}

Chunks RandomChunks(const std::vector<uint32_t>& ids, std::mt19937_64& random) {
  Chunks chunks;
  for (size_t i = 0; i < ids.size();) {
    const size_t size = std::min<size_t>(1 + random() % (1 + random() % 12), ids.size() - i);
    chunks.emplace_back(ids.begin() + i, ids.begin() + i + size);
    i += size;
  }
  return chunks;
}

MessageDelta ReadOutput(const Tokenizer& tokenizer, const OutputParserOptions& options,
                        const Chunks& chunks) {
  const OutputMarkers markers(tokenizer, options.syntax);
  const DetokenizerOptions as_it_is{.skip_special_tokens = true};
  StreamingDetokenizer detokenizer(tokenizer, as_it_is);
  OutputParser parser(options);
  MessageDelta message;
  for (const std::vector<uint32_t>& chunk : chunks) {
    MessageDelta delta;
    std::string text;  // of the chunk since its last marker
    for (const uint32_t id : chunk) {
      const std::optional<Marker> marker = markers.Find(id);
      if (!marker) {
        text += detokenizer.Push({&id, 1});
        continue;
      }
      text += detokenizer.Finish();
      if (!text.empty()) parser.PushText(text, delta);
      text.clear();
      parser.PushMarker(*marker, detokenizer.Push({&id, 1}), delta);
    }
    if (!text.empty()) parser.PushText(text, delta);
    message.Append(std::move(delta));
  }
  MessageDelta end;
  const std::string rest = detokenizer.Finish();
  if (!rest.empty()) parser.PushText(rest, end);
  parser.Finish(end);
  message.Append(std::move(end));
  return message;
}

std::string Shown(const MessageDelta& message) {
  std::string shown = "reasoning[" + message.reasoning + "] content[" + message.content + "]";
  for (const ToolCallDelta& call : message.tool_calls) {
    shown += " call " + std::to_string(call.index) + " " + call.id + " " + call.name + "(" +
             call.arguments + ")";
  }
  return shown;
}

}  // namespace fathom
