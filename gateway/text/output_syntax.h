// What a model writes besides text: how it marks its thoughts and its tool calls.
#pragma once

namespace fathom {

// The form of tool calls.
enum class ToolSyntax {
  kV3,  // <｜tool▁call▁begin｜>type<｜tool▁sep｜>name\n```json\narguments\n```<｜tool▁call▁end｜>
  kV31,   // <｜tool▁call▁begin｜>name<｜tool▁sep｜>arguments<｜tool▁call▁end｜>
  kDsml,  // <｜DSML｜invoke name="…"> with a <｜DSML｜parameter …> for each argument
  kKimiK2,  // <|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>arguments<|tool_call_end|>
};

enum class ThinkSyntax {
  kNone,       // the model does not think
  kThinkTags,  // between <think> and </think>; the prompt has begun it, or says that it does not
  kMayThink,   // the same, but where the prompt says neither the model may begin it
};

struct OutputSyntax {
  ToolSyntax tools = ToolSyntax::kV3;
  ThinkSyntax thinking = ThinkSyntax::kNone;
};

}  // namespace fathom
