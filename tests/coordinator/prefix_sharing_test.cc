// Stories of sequences that begin alike, told by what the scheduler has computed.
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::SizeIs;

class PrefixSharingTest : public ::testing::Test {
 protected:
  void Start(Scheduler::Options options) {
    options.share_prefixes = true;
    scheduler_ = std::make_unique<Scheduler>(options);
  }

  // Prompts are the first so many of the numbers from `first` on.
  static Request Asking(int num_prompt_tokens, int max_tokens = 1, uint32_t first = 100) {
    Request request;
    request.prompt_token_ids.resize(num_prompt_tokens);
    std::iota(request.prompt_token_ids.begin(), request.prompt_token_ids.end(), first);
    request.max_tokens = max_tokens;
    return request;
  }
  SequenceId Add(Request request) {
    scheduler_->Add(++last_id_, std::make_shared<const Request>(std::move(request)));
    return last_id_;
  }

  std::vector<SequenceUpdate> Commit(const Step& step, bool has_fault = false) {
    StepOutcome outcome;
    for (const ScheduledSequence& scheduled : step.scheduled) {
      SequenceOutcome& sequence = outcome.sequences.emplace_back();
      if (has_fault) {
        sequence.fault = std::make_unique<absl::Status>(absl::InternalError("not finite"));
      } else if (scheduled.samples) {
        sequence.sampled_token_id = kToken;
      }
    }
    return scheduler_->Commit(step, outcome);
  }

  // "id:found+computed" of each scheduled sequence; found is what was computed before the step.
  static std::vector<std::string> Story(const Step& step) {
    std::vector<std::string> story;
    for (const ScheduledSequence& s : step.scheduled) {
      story.push_back(std::to_string(s.id) + ":" + std::to_string(s.first_token) + "+" +
                      std::to_string(s.num_tokens));
    }
    return story;
  }
  std::vector<std::string> MakeStep() {
    const Step step = scheduler_->Schedule();
    Commit(step);
    return Story(step);
  }
  // What one request computes that has the server for itself.
  std::vector<std::string> Serve(Request request) {
    Add(std::move(request));
    return MakeStep();
  }

  static constexpr uint32_t kToken = 7;  // what every sequence samples
  std::unique_ptr<Scheduler> scheduler_;
  SequenceId last_id_ = 0;
};

TEST_F(PrefixSharingTest, ComputesOnlyWhatAnEarlierRequestHasNot) {
  Start({.block_size = 4, .num_kv_blocks = 16});
  EXPECT_THAT(Serve(Asking(10)), ElementsAre("1:0+10"));
  EXPECT_EQ(scheduler_->num_free_blocks(), 16);

  Add(Asking(10));
  const Step step = scheduler_->Schedule();
  EXPECT_THAT(Story(step), ElementsAre("2:8+2"));
  ASSERT_THAT(step.admitted, SizeIs(1));
  EXPECT_EQ(step.admitted[0].num_computed, 8);
  EXPECT_THAT(step.new_block_ids, ElementsAre(0, 1, 2)) << "the workers learn all of its blocks";
  const std::vector<SequenceUpdate> updates = Commit(step);
  EXPECT_EQ(updates.at(0).num_cached_tokens, 8);
  EXPECT_EQ(updates.at(0).num_prompt_tokens_done, 10);
  EXPECT_EQ(scheduler_->prefix_figures().num_queried, 20);
  EXPECT_EQ(scheduler_->prefix_figures().num_found, 8);
}

TEST_F(PrefixSharingTest, AlwaysComputesTheLastTokenBecauseItTellsTheNext) {
  for (const int block_size : {1, 2, 4, 8, 16, 32, 64, 128}) {
    Start({.block_size = block_size, .num_kv_blocks = 512 / block_size});
    Serve(Asking(256));
    const std::string rest = std::to_string(256 - block_size) + "+" + std::to_string(block_size);
    const std::vector<std::string> same = Serve(Asking(256));
    EXPECT_THAT(same, ElementsAre(std::to_string(last_id_) + ":" + rest));
    const std::vector<std::string> longer = Serve(Asking(257));
    EXPECT_THAT(longer, ElementsAre(std::to_string(last_id_) + ":256+1"));
  }
}

TEST_F(PrefixSharingTest, SharesWithinTheStepThatComputesThePrefix) {
  Start({.block_size = 4, .num_kv_blocks = 16});
  Add(Asking(12, 9));
  Add(Asking(12, 9));
  Add(Asking(9, 9));
  const Step step = scheduler_->Schedule();
  EXPECT_THAT(Story(step), ElementsAre("1:0+12", "2:8+4", "3:8+1"));
  EXPECT_THAT(step.new_block_ids, ElementsAre(0, 1, 2, 0, 1, 3, 0, 1, 4));
  EXPECT_EQ(scheduler_->num_free_blocks(), 11);
  Commit(step);
  EXPECT_TRUE(scheduler_->Cancel(1));
  EXPECT_EQ(scheduler_->num_free_blocks(), 12) << "two of its blocks have other users";
  EXPECT_TRUE(scheduler_->Cancel(2));
  EXPECT_TRUE(scheduler_->Cancel(3));
  EXPECT_EQ(scheduler_->num_free_blocks(), 16);
}

TEST_F(PrefixSharingTest, FindsWhatWasGeneratedAsWellAsWhatWasAsked) {
  Start({.block_size = 2, .num_kv_blocks = 16});
  Add(Asking(3, 5));
  for (int i = 0; i < 5; ++i) MakeStep();  // the KV of the last token is never computed
  Request next_turn = Asking(3, 1);
  next_turn.prompt_token_ids.insert(next_turn.prompt_token_ids.end(), {7, 7, 7, 7, 7, 8, 9});
  EXPECT_THAT(Serve(next_turn), ElementsAre("2:6+4"));
}

TEST_F(PrefixSharingTest, PublishesABlockWhenTheLastOfItsTokensIsKnown) {
  Start({.block_size = 2, .num_kv_blocks = 16});
  Add(Asking(3, 3));
  const Step first = scheduler_->Schedule();
  const Step second = scheduler_->Schedule();
  Request next_turn = Asking(3, 1);
  next_turn.prompt_token_ids.insert(next_turn.prompt_token_ids.end(), {7, 7, 8});
  Add(next_turn);
  const Step third = scheduler_->Schedule();
  EXPECT_THAT(Story(third), ElementsAre("1:4+1", "2:2+4")) << "the 7 is still in flight";
  Commit(first);
  Add(next_turn);
  EXPECT_THAT(Story(scheduler_->Schedule()), ElementsAre("3:4+2"));
  Commit(second);
  EXPECT_EQ(Commit(third).at(0).end, EndReason::kLength);
}

TEST_F(PrefixSharingTest, DoesNotSkipTokensWhosePromptLogprobsAreWanted) {
  Start({.block_size = 4, .num_kv_blocks = 16});
  Serve(Asking(10));
  Request request = Asking(10);
  request.wants_prompt_logprobs = true;
  EXPECT_THAT(Serve(request), ElementsAre("2:0+10"));
  EXPECT_EQ(scheduler_->prefix_figures().num_queried, 10);
  EXPECT_THAT(Serve(Asking(10)), ElementsAre("3:8+2")) << "others still find it";
}

TEST_F(PrefixSharingTest, KeepsRequestsOfDifferentSaltsApart) {
  Start({.block_size = 4, .num_kv_blocks = 16});
  Request salted = Asking(10);
  salted.cache_salt = "a";
  Request other = Asking(10);
  other.cache_salt = "b";
  Serve(Asking(10));
  EXPECT_THAT(Serve(salted), ElementsAre("2:0+10"));
  EXPECT_THAT(Serve(other), ElementsAre("3:0+10"));
  EXPECT_THAT(Serve(salted), ElementsAre("4:8+2"));
}

TEST_F(PrefixSharingTest, APreemptedSequenceFindsItsOwnBlocksAgain) {
  Start({.block_size = 2, .num_kv_blocks = 8});
  Add(Asking(8, 6, 100));
  Add(Asking(5, 4, 200));
  MakeStep();
  std::vector<std::string> story;
  while (scheduler_->num_running() + scheduler_->num_waiting() > 0) {
    const Step step = scheduler_->Schedule();
    for (const AdmittedSequence& admitted : step.admitted) {
      story.push_back(std::to_string(admitted.sequence->id) + " after " +
                      std::to_string(admitted.num_computed));
    }
    for (const SequenceUpdate& update : Commit(step)) {
      if (update.end.has_value()) {
        EXPECT_EQ(update.num_cached_tokens, 0) << "of others, at first";
      }
    }
  }
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_THAT(story, ElementsAre("2 after 2")) << "the first took the rest";
  EXPECT_EQ(scheduler_->num_free_blocks(), 8);
}

TEST_F(PrefixSharingTest, AdmitsMoreThanWouldFitApart) {
  Start({.block_size = 4, .num_kv_blocks = 10});
  for (int i = 0; i < 4; ++i) Add(Asking(25, 3));
  EXPECT_THAT(MakeStep(), ElementsAre("1:0+25", "2:24+1", "3:24+1", "4:24+1"));
}

TEST_F(PrefixSharingTest, NobodyInheritsTheNumbersOfASequenceWithAFault) {
  Start({.block_size = 4, .num_kv_blocks = 16});
  Serve(Asking(10));
  Add(Asking(10));
  const Step step = scheduler_->Schedule();
  EXPECT_THAT(Story(step), ElementsAre("2:8+2"));
  EXPECT_EQ(Commit(step, /*has_fault=*/true).at(0).end, EndReason::kFault);
  EXPECT_THAT(Serve(Asking(10)), ElementsAre("3:0+10"));
  EXPECT_THAT(Serve(Asking(10)), ElementsAre("4:8+2"));
  EXPECT_EQ(scheduler_->num_free_blocks(), 16);
}

TEST_F(PrefixSharingTest, GoesWhereThePrefixLivesUnlessThatDomainIsFuller) {
  Start({.block_size = 4, .num_kv_blocks = 10, .num_kv_domains = 2});
  Add(Asking(9, 9));
  Add(Asking(9, 9));
  EXPECT_THAT(MakeStep(), ElementsAre("1:0+9", "2:0+9")) << "each domain has room";
  EXPECT_EQ(scheduler_->num_free_blocks(), 14);
  scheduler_->Cancel(1);
  // As much room there as the prefix is long beside nothing here: the roomier domain has both.
  EXPECT_THAT(Serve(Asking(9)), ElementsAre("2:9+1", "3:8+1"));
  EXPECT_EQ(scheduler_->num_free_blocks(), 17);
}

TEST_F(PrefixSharingTest, EvictsWhatNobodyUsedForLongest) {
  Start({.block_size = 4, .num_kv_blocks = 6});
  Serve(Asking(9, 1, 100));
  Serve(Asking(9, 1, 200));
  EXPECT_THAT(Serve(Asking(9, 1, 100)), ElementsAre("3:8+1"));
  Serve(Asking(13, 1, 300));
  EXPECT_THAT(Serve(Asking(9, 1, 100)), ElementsAre("5:8+1"));
  EXPECT_THAT(Serve(Asking(9, 1, 200)), ElementsAre("6:0+9"));
}

TEST_F(PrefixSharingTest, IsOffUnlessAskedFor) {
  scheduler_ = std::make_unique<Scheduler>(Scheduler::Options{.block_size = 4, .num_kv_blocks = 8});
  Serve(Asking(10));
  EXPECT_THAT(Serve(Asking(10)), ElementsAre("2:0+10"));
  EXPECT_EQ(scheduler_->prefix_figures().num_queried, 0);
}

}  // namespace
}  // namespace fathom
