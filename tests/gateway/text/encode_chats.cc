// encode_chats MODEL_DIR NAME: the prompts of chat requests, one JSON object a line, as the chat
// encoding NAME prints them, for comparison with the official templates.
//
//   {"text":"…","thinking":true}   whether it ends within the model's thoughts
//   {"error":"…"}                  why there is none
#include <iostream>
#include <string>

#include "absl/strings/str_cat.h"
#include "gateway/openai/chat_request.h"
#include "gateway/openai/json_writer.h"
#include "gateway/text/chat_encoding.h"
#include "gateway/text/tokenizer.h"

namespace fathom {
namespace {

std::string Answer(const ChatEncoder& encoder, const std::string& line) {
  JsonWriter json;
  const absl::StatusOr<ChatRequest> request = ParseChatRequest(line, {}, {});
  absl::Status status = request.status();
  if (status.ok()) {
    const ChatPrompt& prompt = request->prompt;
    const absl::StatusOr<std::string> text = encoder.Encode(prompt.messages, prompt.options);
    status = text.status();
    if (status.ok()) {
      json.BeginObject().Key("text").String(*text).Key("thinking");
      json.Bool(encoder.EndsInThinking(prompt.messages, prompt.options)).EndObject();
      return json.Take();
    }
  }
  json.BeginObject().Key("error").String(std::string(status.message())).EndObject();
  return json.Take();
}

int Run(const std::string& model_dir, const std::string& name) {
  const auto tokenizer = Tokenizer::Load(model_dir);
  if (!tokenizer.ok()) {
    std::cerr << tokenizer.status().message() << "\n";
    return 1;
  }
  const auto encoder =
      name == "auto" ? ChatEncoder::Create(**tokenizer) : ChatEncoder::Create(**tokenizer, name);
  if (!encoder.ok()) {
    std::cerr << encoder.status().message() << "\n";
    return 1;
  }
  std::cout << encoder->layout().name << "\n";
  for (std::string line; std::getline(std::cin, line);) std::cout << Answer(*encoder, line) << "\n";
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: encode_chats MODEL_DIR NAME|auto < lines\n";
    return 64;
  }
  return fathom::Run(argv[1], argv[2]);
}
