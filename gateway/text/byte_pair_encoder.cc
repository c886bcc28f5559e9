#include "gateway/text/byte_pair_encoder.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace fathom {

BytePairEncoder::BytePairEncoder(const std::array<uint32_t, 256>& byte_ids,
                                 const std::vector<Merge>& merges, std::vector<Token> tokens)
    : byte_ids_(byte_ids), tokens_(std::move(tokens)) {
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    const RankedMerge ranked = {static_cast<uint32_t>(rank), merge.joined};
    CHECK(merges_.emplace(Key(merge.left, merge.right), ranked).second) << "rank " << rank;
  }

  Workspace workspace;
  std::vector<uint32_t> ids;
  whole_words_.reserve(tokens_.size());
  for (const Token& token : tokens_) {
    ids.clear();
    EncodeByMerging(token.bytes, workspace, ids);
    if (ids.size() == 1 && ids[0] == token.id) whole_words_.emplace(token.bytes, token.id);
  }
}

void BytePairEncoder::Encode(std::string_view word, Workspace& workspace,
                             std::vector<uint32_t>& ids) const {
  if (const auto token = whole_words_.find(word); token != whole_words_.end()) {
    ids.push_back(token->second);
    return;
  }
  EncodeByMerging(word, workspace, ids);
}

void BytePairEncoder::EncodeByMerging(std::string_view word, Workspace& workspace,
                                      std::vector<uint32_t>& ids) const {
  if (word.empty()) return;
  CHECK_LT(word.size(), Workspace::kNone);
  const auto num_bytes = static_cast<uint32_t>(word.size());
  auto& symbols = workspace.symbols_;
  auto& queue = workspace.queue_;
  symbols.resize(num_bytes);
  queue.clear();
  for (uint32_t i = 0; i < num_bytes; ++i) {
    symbols[i] = {.id = byte_ids_[static_cast<unsigned char>(word[i])],
                  .previous = i == 0 ? Workspace::kNone : i - 1,
                  .next = i + 1 == num_bytes ? Workspace::kNone : i + 1,
                  .rank = Workspace::kNone,
                  .joined = Workspace::kNone};
  }
  for (uint32_t i = 0; i < num_bytes; ++i) RankPair(i, workspace);
  std::make_heap(queue.begin(), queue.end(), std::greater<>());

  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), std::greater<>());
    const uint64_t entry = queue.back();
    queue.pop_back();
    const auto position = static_cast<uint32_t>(entry);
    if (symbols[position].rank == entry >> 32) MergePair(position, workspace);
  }
  for (uint32_t i = 0; i != Workspace::kNone; i = symbols[i].next) ids.push_back(symbols[i].id);
}

// Looks up what the symbol at `position` and the next one become, and puts that into the queue
// (not as a heap yet).
void BytePairEncoder::RankPair(uint32_t position, Workspace& workspace) const {
  Workspace::Symbol& symbol = workspace.symbols_[position];
  symbol.rank = Workspace::kNone;
  if (symbol.next == Workspace::kNone) return;
  const auto merge = merges_.find(Key(symbol.id, workspace.symbols_[symbol.next].id));
  if (merge == merges_.end()) return;
  symbol.rank = merge->second.rank;
  symbol.joined = merge->second.joined;
  workspace.queue_.push_back(static_cast<uint64_t>(symbol.rank) << 32 | position);
}

void BytePairEncoder::MergePair(uint32_t position, Workspace& workspace) const {
  auto& symbols = workspace.symbols_;
  auto& queue = workspace.queue_;
  Workspace::Symbol& symbol = symbols[position];
  Workspace::Symbol& absorbed = symbols[symbol.next];
  symbol.id = symbol.joined;
  symbol.next = absorbed.next;
  absorbed.rank = Workspace::kNone;
  if (symbol.next != Workspace::kNone) symbols[symbol.next].previous = position;

  for (const uint32_t changed : {symbol.previous, position}) {
    if (changed == Workspace::kNone) continue;
    const size_t queue_size = queue.size();
    RankPair(changed, workspace);
    if (queue.size() > queue_size) std::push_heap(queue.begin(), queue.end(), std::greater<>());
  }
}

}  // namespace fathom
