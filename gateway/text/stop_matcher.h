// Ends a stream of text at the first stop string.
//
// Only what could still become a stop string is held back: the longest end of the text so far that
// begins one. Time is linear in the text, whatever the stop strings are (Aho-Corasick), and the
// result does not depend on how the text was cut into pieces: the stop string that is complete
// first wins, and of several that end at the same byte the longest.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/text/byte_trie.h"

namespace fathom {

// What becomes of the stop string itself.
enum class StopString { kLeaveOut, kInclude };

// Not thread-safe; one per choice.
class StopMatcher {
 public:
  // `stop_strings`: not empty strings (the gateway refuses those); none at all is allowed.
  StopMatcher(std::vector<std::string> stop_strings, StopString stop_string);

  // Takes the next piece and returns the text that may be shown now. Once stopped() it returns ""
  // and looks at nothing more. With whole characters in, whole characters come out.
  std::string Push(std::string_view text);

  // The end of the text: what was held back, which no stop string completed.
  std::string Finish();

  // The index of the stop string that ended the text; nullopt while none did.
  std::optional<size_t> stopped() const { return stopped_; }

  const std::vector<std::string>& stop_strings() const { return stop_strings_; }

 private:
  // What a node of the trie knows besides its children.
  struct Node {
    int fallback = ByteTrie::kRoot;      // the longest proper end of this node that is a node too
    int match = ByteTrie::kNoValue;      // the longest stop string that ends here
    int prefix_of = ByteTrie::kNoValue;  // a stop string that this node begins
  };

  int Next(int node, char byte) const;
  std::string_view Held() const;

  const std::vector<std::string> stop_strings_;
  const StopString stop_string_;
  ByteTrie trie_;
  std::vector<Node> nodes_;     // [node of trie_]
  int node_ = ByteTrie::kRoot;  // spells what is held back
  std::optional<size_t> stopped_;
};

}  // namespace fathom
