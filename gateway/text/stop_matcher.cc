#include "gateway/text/stop_matcher.h"

#include <utility>

#include "base/check.h"

namespace fathom {

StopMatcher::StopMatcher(std::vector<std::string> stop_strings, StopString stop_string)
    : stop_strings_(std::move(stop_strings)), stop_string_(stop_string) {
  for (size_t i = 0; i < stop_strings_.size(); ++i) {
    CHECK(!stop_strings_[i].empty()) << "an empty stop string";
    trie_.Insert(stop_strings_[i], static_cast<int>(i));
  }

  // Shorter paths come first, so a node's fallback is complete before the node needs it.
  nodes_.resize(trie_.num_nodes());
  for (const ByteTrie::Edge& edge : trie_.EdgesByDepth()) {
    Node& node = nodes_[edge.child];
    if (edge.parent != ByteTrie::kRoot)
      node.fallback = Next(nodes_[edge.parent].fallback, edge.byte);
    const int own = trie_.value(edge.child);
    node.match = own != ByteTrie::kNoValue ? own : nodes_[node.fallback].match;
  }
  for (size_t i = 0; i < stop_strings_.size(); ++i) {
    int node = ByteTrie::kRoot;
    for (const char byte : stop_strings_[i]) {
      node = trie_.Child(node, byte);
      nodes_[node].prefix_of = static_cast<int>(i);
    }
  }
}

int StopMatcher::Next(int node, char byte) const {
  while (true) {
    const int child = trie_.Child(node, byte);
    if (child != ByteTrie::kNoNode) return child;
    if (node == ByteTrie::kRoot) return ByteTrie::kRoot;
    node = nodes_[node].fallback;
  }
}

std::string_view StopMatcher::Held() const {
  if (node_ == ByteTrie::kRoot) return "";
  return std::string_view(stop_strings_[nodes_[node_].prefix_of]).substr(0, trie_.depth(node_));
}

std::string StopMatcher::Push(std::string_view text) {
  if (stopped_.has_value()) return "";
  if (stop_strings_.empty()) return std::string(text);

  const std::string_view held = Held();
  size_t end = 0;
  while (end < text.size() && !stopped_.has_value()) {
    node_ = Next(node_, text[end++]);
    const int match = nodes_[node_].match;
    if (match != ByteTrie::kNoValue) stopped_ = static_cast<size_t>(match);
  }

  // The text known so far is `held`, then `text` up to `end`; all but its last bytes may be shown.
  size_t num_hidden = trie_.depth(node_);
  if (stopped_.has_value()) {
    num_hidden = stop_string_ == StopString::kInclude ? 0 : stop_strings_[*stopped_].size();
    node_ = ByteTrie::kRoot;
  }
  const size_t num_shown = held.size() + end - num_hidden;
  if (num_shown <= held.size()) return std::string(held.substr(0, num_shown));
  std::string shown(held);
  shown.append(text.substr(0, num_shown - held.size()));
  return shown;
}

std::string StopMatcher::Finish() {
  std::string held(Held());
  node_ = ByteTrie::kRoot;
  return held;
}

}  // namespace fathom
