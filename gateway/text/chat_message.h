// A conversation as an API hands it over, before it becomes text.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace fathom {

struct ChatToolCall {
  std::string id;  // may be empty
  std::string type = "function";
  std::string name;
  std::string arguments;  // the JSON text, printed verbatim
};

struct ChatMessage {
  enum class Role { kSystem, kUser, kAssistant, kTool };
  Role role = Role::kUser;
  std::optional<std::string> content;    // null only for an assistant that calls tools
  std::vector<ChatToolCall> tool_calls;  // assistant only
  std::string reasoning;                 // assistant only: what it thought, without <think>
  std::string name;                      // of who speaks; Kimi prints it
  std::string tool_call_id;              // tool only: the call that this answers
  bool prefix = false;                   // assistant, last: DeepSeek's word for "go on from here"
};

// A tool that the model may call. JSON as Python's json.dumps prints it (python_json.h), since
// that is what the models were trained on.
struct ChatTool {
  std::string name;
  std::string description;
  std::string parameters;  // JSON schema
  std::string function;    // JSON of "function", as the client sent it
  std::string json;        // JSON of the whole tool
};

struct ChatOptions {
  // Ends with <｜Assistant｜> or the like, so that the model answers.
  bool add_generation_prompt = true;
  // Leaves the last message open, so that the model goes on writing it. It must be a user's or an
  // assistant's, have content and call no tools. Not together with add_generation_prompt.
  bool continue_final_message = false;
  // Where the model can do both, it thinks before it answers.
  bool thinking = false;
  std::vector<ChatTool> tools;
};

}  // namespace fathom
