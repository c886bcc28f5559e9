#include "gateway/text/tokenizer.h"

#include <utility>

namespace fathom {

struct Tokenizer::State {
  std::string chat_template;
};

Tokenizer::Tokenizer(std::unique_ptr<const State> state) : state_(std::move(state)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& model_dir) {
  return absl::UnimplementedError("tokenizer of " + model_dir);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view, std::string_view) {
  return absl::UnimplementedError("tokenizer");
}

std::vector<uint32_t> Tokenizer::Encode(std::string_view, BosPolicy) const { return {}; }
std::string_view Tokenizer::BytesOf(uint32_t) const { return {}; }
bool Tokenizer::IsSpecial(uint32_t) const { return false; }
std::optional<uint32_t> Tokenizer::AddedToken(std::string_view) const { return std::nullopt; }
std::optional<uint32_t> Tokenizer::bos() const { return std::nullopt; }
std::optional<uint32_t> Tokenizer::eos() const { return std::nullopt; }
uint32_t Tokenizer::vocab_size() const { return 0; }
const std::string& Tokenizer::chat_template() const { return state_->chat_template; }

}  // namespace fathom
