#include "gateway/text/output_parser.h"

#include <utility>

namespace fathom {

OutputParser::OutputParser(OutputParserOptions options)
    : options_(std::move(options)),
      tools_(options_.calls_tools ? MakeToolCallParser(options_.syntax.tools) : nullptr),
      thinks_(options_.begins_in_thinking) {}

void OutputParser::PushText(std::string_view text, MessageDelta& delta) {
  delta_ = &delta;
  if (tools_ != nullptr) {
    tools_->PushText(text, *this);
  } else {
    PlainText(text);
  }
}

void OutputParser::PushMarker(Marker marker, std::string_view text, MessageDelta& delta) {
  delta_ = &delta;
  const bool is_about_thoughts = marker == Marker::kThink || marker == Marker::kThinkEnd;
  if (!is_about_thoughts && tools_ != nullptr) {
    tools_->PushMarker(marker, text, *this);
  } else if (!is_about_thoughts) {
    PlainText(text);
  } else if (tools_ != nullptr && tools_->is_in_call()) {
    tools_->PushText(text, *this);
  } else {
    if (tools_ != nullptr) tools_->Finish(*this);
    thinks_ = marker == Marker::kThink;
  }
}

void OutputParser::Finish(MessageDelta& delta) {
  delta_ = &delta;
  if (tools_ != nullptr) tools_->Finish(*this);
}

void OutputParser::PlainText(std::string_view text) {
  if (!thinks_) {
    delta_->AddContent(text);
  } else if (options_.include_reasoning) {
    delta_->AddReasoning(text);
  }
}

void OutputParser::BeginCall(std::string id, std::string name) {
  ++num_calls_;
  if (options_.only_one_call && num_calls_ > 1) return;
  if (id.empty() && options_.make_call_id) id = options_.make_call_id();
  delta_->BeginCall(num_calls_ - 1, std::move(id), std::move(name));
}

void OutputParser::Arguments(std::string_view text) {
  if (options_.only_one_call && num_calls_ > 1) return;
  delta_->AddArguments(num_calls_ - 1, text);
}

}  // namespace fathom
