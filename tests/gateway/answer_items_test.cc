#include "gateway/openai/answer_items.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;

// What a model may write: thoughts, text, calls, in any order.
struct Step {
  char kind;  // r: thoughts, c: text, b: begins the next call, a: arguments of it
  std::string text;
};

const std::vector<Step>& Steps() {
  static const std::vector<Step> steps = {
      {'r', "hm"}, {'r', "m"},   {'c', "a"}, {'r', "oh"}, {'c', "b"},   {'b', "get"},    {'a', "{"},
      {'a', "}"},  {'b', "put"}, {'c', "c"}, {'c', "d"},  {'b', "get"}, {'a', "[\"x\"]"}};
  return steps;
}

MessageDelta DeltaOf(size_t begin, size_t end) {
  MessageDelta delta;
  size_t num_calls = 0;
  for (size_t i = 0; i < begin; ++i) num_calls += Steps()[i].kind == 'b';
  for (size_t i = begin; i < end; ++i) {
    const Step& step = Steps()[i];
    if (step.kind == 'r') delta.AddReasoning(step.text);
    if (step.kind == 'c') delta.AddContent(step.text);
    if (step.kind == 'b') delta.BeginCall(num_calls++, absl::StrCat("id", i), step.text);
    if (step.kind == 'a') delta.AddArguments(num_calls - 1, step.text);
  }
  return delta;
}

// Writes down what it is told.
class Scribe : public AnswerItems::Listener {
 public:
  void OnBegin(const AnswerItem& item) override {
    absl::StrAppend(&log_, item.index, "(", item.name);
  }
  void OnPiece(const AnswerItem& item, std::string_view piece) override {
    EXPECT_TRUE(item.text.ends_with(piece));
    absl::StrAppend(&log_, ":", std::string(piece));
  }
  void OnEnd(const AnswerItem&) override { log_ += ")"; }

  std::string log_;
};

std::vector<std::string> Shown(const AnswerItems& items) {
  std::vector<std::string> shown;
  for (const AnswerItem& item : items.items()) {
    shown.push_back(absl::StrCat(item.name, item.call_id, "=", item.text));
  }
  return shown;
}

TEST(AnswerItemsTest, ComeInTheOrderInWhichTheModelWroteThem) {
  AnswerItems items;
  items.Append(DeltaOf(0, Steps().size()), nullptr);
  EXPECT_THAT(Shown(items), ElementsAre("=hmm", "=a", "=oh", "=b", "getid5={}", "putid8=", "=cd",
                                        "getid11=[\"x\"]"));
}

TEST(AnswerItemsTest, AreTheSameHoweverTheAnswerIsCut) {
  AnswerItems whole;
  whole.Append(DeltaOf(0, Steps().size()), nullptr);
  // Every way to cut it into three, with the first two joined again as a response that is not
  // streamed joins them.
  for (size_t first = 0; first <= Steps().size(); ++first) {
    for (size_t second = first; second <= Steps().size(); ++second) {
      MessageDelta joined = DeltaOf(0, first);
      joined.Append(DeltaOf(first, second));
      AnswerItems items;
      items.Append(joined, nullptr);
      items.Append(DeltaOf(second, Steps().size()), nullptr);
      EXPECT_EQ(Shown(items), Shown(whole)) << first << " " << second;
    }
  }
}

TEST(AnswerItemsTest, EndBeforeTheNextBegins) {
  AnswerItems items;
  Scribe scribe;
  for (size_t i = 0; i < Steps().size(); ++i) items.Append(DeltaOf(i, i + 1), &scribe);
  items.Finish(&scribe);
  EXPECT_EQ(scribe.log_, "0(:hm:m)1(:a)2(:oh)3(:b)4(get:{:})5(put)6(:c:d)7(get:[\"x\"])");
}

TEST(AnswerItemsTest, AnEmptyAnswerHasNone) {
  AnswerItems items;
  Scribe scribe;
  items.Append({}, &scribe);
  items.Finish(&scribe);
  EXPECT_EQ(scribe.log_, "");
}

}  // namespace
}  // namespace fathom
