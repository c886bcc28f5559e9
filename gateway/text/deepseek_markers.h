// DeepSeek's special tokens and what its chat formats share.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/types/span.h"
#include "gateway/text/chat_message.h"

namespace fathom::deepseek {

inline constexpr std::string_view kBos = "<｜begin▁of▁sentence｜>";
inline constexpr std::string_view kEos = "<｜end▁of▁sentence｜>";
inline constexpr std::string_view kUser = "<｜User｜>";
inline constexpr std::string_view kAssistant = "<｜Assistant｜>";
inline constexpr std::string_view kThink = "<think>";
inline constexpr std::string_view kThinkEnd = "</think>";
inline constexpr std::string_view kCallsBegin = "<｜tool▁calls▁begin｜>";
inline constexpr std::string_view kCallsEnd = "<｜tool▁calls▁end｜>";
inline constexpr std::string_view kCallBegin = "<｜tool▁call▁begin｜>";
inline constexpr std::string_view kCallEnd = "<｜tool▁call▁end｜>";
inline constexpr std::string_view kSeparator = "<｜tool▁sep｜>";
inline constexpr std::string_view kOutputsBegin = "<｜tool▁outputs▁begin｜>";
inline constexpr std::string_view kOutputsEnd = "<｜tool▁outputs▁end｜>";
inline constexpr std::string_view kOutputBegin = "<｜tool▁output▁begin｜>";
inline constexpr std::string_view kOutputEnd = "<｜tool▁output▁end｜>";
inline constexpr std::string_view kDsml = "｜DSML｜";

inline constexpr std::string_view kTokens[] = {kBos, kEos, kUser, kAssistant};
inline constexpr std::string_view kThinkingTokens[] = {kBos,       kEos,   kUser,
                                                       kAssistant, kThink, kThinkEnd};
inline constexpr std::string_view kToolTokens[] = {kCallsBegin, kCallsEnd,    kCallBegin,
                                                   kCallEnd,    kSeparator,   kOutputsBegin,
                                                   kOutputsEnd, kOutputBegin, kOutputEnd};

// The system messages, with empty lines between, and behind them what tells of the tools.
//
// Only the model card of DeepSeek-V3.1 says how to tell of tools where the template does not. V3
// and R1 are told in the same words, with their own form of a call.
std::string SystemPrompt(absl::Span<const ChatMessage> messages, const ChatOptions& options,
                         std::string_view form_of_a_call);

// One tool call in the form of V3 and R1, from <｜tool▁call▁begin｜> to <｜tool▁call▁end｜>.
std::string CallWithType(const ChatToolCall& call);
inline constexpr std::string_view kFormOfACallWithType =
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```"
    "<｜tool▁call▁end｜>";

// What follows the last </think> of an answer; all of it where there is none.
std::string_view AfterThinking(std::string_view content);

// Whether a message that is left open has begun to think and not ended it.
bool IsLeftThinking(const ChatMessage& message);

// Whether `message`, one of `messages`, is the one that is left open.
bool IsLeftOpen(const ChatMessage& message, absl::Span<const ChatMessage> messages,
                const ChatOptions& options);

}  // namespace fathom::deepseek
