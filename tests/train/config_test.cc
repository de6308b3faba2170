// The configuration: defaults, files, overrides, what is wrong said with line and name, and its own text read back.
#include "train/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/model/tiny_model.h"

namespace sparsek::train {
namespace {

using sparsek::test::message_of;
using testing::AllOf;
using testing::HasSubstr;

TrainConfig parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return parse_config(text, "run.toml", overrides);
}
std::string problem(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return message_of<UsageError>([&] { parse(text, overrides); });
}
const std::string kRecall = "[data]\ntask = \"recall\"\n";

TEST(TrainConfig, FileThenOverrides) {
  const TrainConfig config =
      parse(kRecall + "seqlen = 4096\n[optimiser]\nlr = 1\n[scorer]\ndelayed = false\n",
            {"optimiser.lr=2.5e-4", "run.folder=out/a b", "attention.kind=window", "data.seqlen=2048"});
  EXPECT_EQ(config.optimiser.lr, 2.5e-4);
  EXPECT_EQ(config.data.seqlen, 2048);
  EXPECT_EQ(config.run.folder, "out/a b");
  EXPECT_EQ(config.attention.kind, "window");
  EXPECT_FALSE(config.scorer.delayed);
  EXPECT_EQ(parse(kRecall + "[optimiser]\nlr = 1").optimiser.lr, 1);  // a whole number is a number
}

TEST(TrainConfig, SaysWhatIsWrong) {
  EXPECT_THAT(problem("[optimiser]\n\nlearnrate = 1"),
              AllOf(HasSubstr("run.toml:3"), HasSubstr("optimiser.learnrate"), HasSubstr("did you mean")));
  EXPECT_THAT(problem("[attention]\nwindow_sise = 1"), HasSubstr("did you mean attention.window_size?"));
  EXPECT_THAT(problem("[optimiser]\ntopk = 1"), HasSubstr("did you mean attention.topk?"));
  EXPECT_THAT(problem("[atention]\ntopk = 1"), AllOf(HasSubstr("run.toml:1"), HasSubstr("did you mean attention")));
  EXPECT_THAT(problem("topk = 1"), AllOf(HasSubstr("run.toml:1"), HasSubstr("did you mean attention.topk?")));
  EXPECT_THAT(problem("[run]\nsteps = \"many\""),
              AllOf(HasSubstr("run.toml:2"), HasSubstr("run.steps"), HasSubstr("expected a whole number, found text")));
  EXPECT_THAT(problem("[run]\nsteps = 1.5"), HasSubstr("expected a whole number, found a number"));
  EXPECT_THAT(problem("[scorer]\ndelayed = 1"), HasSubstr("expected true or false, found a whole number"));
  EXPECT_THAT(problem("[run]\nfolder = 3"), HasSubstr("expected text in quotes"));
  EXPECT_THAT(problem("[run\nsteps = 1"), HasSubstr("run.toml:1"));
  EXPECT_THAT(problem(kRecall, {"run.stps=3"}), AllOf(HasSubstr("command line"), HasSubstr("did you mean run.steps?")));
  EXPECT_THAT(problem(kRecall, {"run.steps=x"}), AllOf(HasSubstr("run.steps"), HasSubstr("'x'")));
  EXPECT_THAT(problem(kRecall, {"run.steps"}), HasSubstr("key=value"));
}

TEST(TrainConfig, ChecksValues) {
  EXPECT_THAT(problem(""), HasSubstr("data.train"));
  EXPECT_THAT(problem(kRecall, {"attention.kind=full"}), HasSubstr("dense, window, sparsek"));
  EXPECT_THAT(problem(kRecall, {"attention.topk=0"}), HasSubstr("attention.topk"));
  EXPECT_THAT(problem(kRecall, {"optimiser.lr=nan"}), HasSubstr("optimiser.lr"));
  EXPECT_THAT(problem(kRecall, {"loss.kl=1"}), HasSubstr("model.base"));
  EXPECT_THAT(problem(kRecall, {"trainable.part=lora"}), HasSubstr("model.base"));
  EXPECT_THAT(problem(kRecall, {"optimiser.scale_lr=-0.5"}), HasSubstr("optimiser.scale_lr"));
  EXPECT_EQ(problem(kRecall, {"optimiser.scale_lr=-1"}), "no exception");
  EXPECT_THAT(problem(kRecall, {"scorer.lookup_heads=-1"}), HasSubstr("scorer.lookup_heads"));
  EXPECT_THAT(problem(kRecall, {"scorer.lookup_slope=-1"}), HasSubstr("scorer.lookup_slope"));
  EXPECT_THAT(problem(kRecall, {"scorer.largest_slope=-2"}), HasSubstr("scorer.largest_slope"));
  EXPECT_THAT(problem(kRecall, {"scorer.largest_slope=0.5", "scorer.slope=1"}),
              AllOf(HasSubstr("scorer.slope"), HasSubstr("at most scorer.largest_slope 0.5")));
  EXPECT_EQ(problem(kRecall, {"scorer.largest_slope=0.5", "scorer.slope=0.5"}), "no exception");
  EXPECT_THAT(problem(kRecall, {"scorer.lookup_heads=2", "recurrent.chunk=16"}), HasSubstr("fewer than 32 tokens"));
  EXPECT_THAT(problem(kRecall, {"attention.pool_size=100"}), HasSubstr("more than topk"));
  EXPECT_THAT(problem(kRecall, {"attention.layers=8+12, 8"}),
              AllOf(HasSubstr("attention.layers"), HasSubstr("topk+window")));
  EXPECT_THAT(problem(kRecall, {"attention.layers=8+12, 600+12", "attention.pool_size=550"}),
              HasSubstr("more than topk 600"));
  EXPECT_THAT(problem(kRecall, {"attention.layers=8+12", "schedule.anneal_steps=10"}),
              HasSubstr("expected 0 with attention.layers"));
  EXPECT_EQ(problem(kRecall, {"attention.layers=8+12, 600+12"}), "no exception");
  const std::string with_layers = std::string(kRecall) + "\n[attention]\nlayers = \"8+12, 6+12\"";
  EXPECT_EQ(problem(with_layers), "no exception");
  EXPECT_THAT(problem(with_layers, {"attention.topk=9"}),
              AllOf(HasSubstr("attention.topk"), HasSubstr("attention.layers=")));
  EXPECT_THAT(problem(with_layers, {"attention.window_size=9"}), HasSubstr("attention.window_size"));
  EXPECT_EQ(problem(with_layers, {"attention.window_size=9", "attention.kind=window"}), "no exception");
  EXPECT_EQ(problem(with_layers, {"attention.topk=9", "attention.layers="}), "no exception");
  EXPECT_EQ(problem(kRecall, {"attention.layers=8+12", "schedule.anneal_steps=10", "attention.kind=window"}),
            "no exception");
  EXPECT_THAT(problem(kRecall, {"attention.layers=8+12, 6+300", "attention.far_distance=299"}),
              AllOf(HasSubstr("attention.far_distance"), HasSubstr("largest window 300")));
  EXPECT_EQ(problem(kRecall, {"attention.layers=8+12, 6+300", "attention.far_distance=300"}), "no exception");
  EXPECT_THAT(problem(kRecall, {"attention.layers=8+12, 8+9000"}), HasSubstr("data.seqlen"));  // a window's reach
  EXPECT_THAT(problem(kRecall, {"loss.teacher=smollm2"}), HasSubstr("expected none with loss.kl 0"));
  EXPECT_EQ(problem(kRecall, {"loss.teacher=smollm2", "loss.kl=1"}), "no exception");
  EXPECT_THAT(problem(kRecall, {"schedule.anneal_steps=10", "recurrent.chunk=64"}), HasSubstr("recurrent.chunk"));
  EXPECT_THAT(problem(kRecall, {"schedule.topk_from=600"}), HasSubstr("schedule.anneal_steps"));
  EXPECT_THAT(problem(kRecall, {"schedule.anneal_steps=9", "schedule.topk_from=900", "attention.pool_size=600"}),
              HasSubstr("more than schedule.topk_from 900"));
  const std::vector<std::string> annealed = {"schedule.anneal_steps=9", "attention.topk=20",
                                             "attention.window_size=30"};
  EXPECT_THAT(problem(kRecall, {annealed[0], annealed[1], annealed[2], "schedule.window_from=300"}),
              AllOf(HasSubstr("schedule.window_from"), HasSubstr("at most attention.far_distance")));
  EXPECT_EQ(problem(kRecall,
                    {annealed[0], annealed[1], annealed[2], "schedule.window_from=300", "attention.far_distance=300"}),
            "no exception");
  EXPECT_THAT(problem(kRecall, {"data.validation_fraction=1"}), HasSubstr("data.validation_fraction"));
  EXPECT_THAT(problem(kRecall, {"data.batch=1048576"}),
              AllOf(HasSubstr("data.batch"), HasSubstr("131072 rows of 8192")));
  EXPECT_THAT(problem(kRecall, {"data.batch=1048576", "recurrent.chunk=4096"}), HasSubstr("262144 rows of 4096"));
  EXPECT_THAT(problem(kRecall, {"data.seqlen=100"}), HasSubstr("data.seqlen"));
  EXPECT_EQ(problem(kRecall, {"data.seqlen=600"}), "no exception");
  EXPECT_THAT(problem(kRecall, {"data.seqlen=600", "data.recall_repeats=2"}), HasSubstr("data.seqlen"));
  EXPECT_THAT(problem(kRecall, {"validation.from_position=8192"}), HasSubstr("less than data.seqlen 8192"));
  const std::vector<std::string> chunks = {"recurrent.chunk=512", "validation.batches=8"};
  EXPECT_THAT(problem(kRecall, {chunks[0], chunks[1], "validation.from_position=4096"}),
              AllOf(HasSubstr("validation.from_position"), HasSubstr("4096")));
  EXPECT_EQ(problem(kRecall, {chunks[0], chunks[1], "validation.from_position=4095"}), "no exception");
}

TEST(TrainConfig, TextGivesTheSameConfig) {
  const TrainConfig config = parse(kRecall, {"run.folder=a\"b\\c\td", "optimiser.eps=1e-12", "optimiser.lr=1",
                                             "scorer.cut_gradient=true", "run.seed=9007199254740993"});
  const std::string text = config_text(config);
  TrainConfig again = parse(text);
  EXPECT_EQ(config_text(again), text);
  EXPECT_EQ(again.run.folder, "a\"b\\c\td");
  EXPECT_EQ(again.run.seed, 9007199254740993);
}

TEST(TrainConfig, FolderIsNoFile) {
  const sparsek::test::TemporaryFolder folder;
  EXPECT_THAT(sparsek::test::message_of<DataError>([&] { load_config(folder.path(), {}); }),
              AllOf(HasSubstr(folder.path()), HasSubstr("found a directory")));
}

TEST(TrainConfig, EveryKeyOnce) {
  TrainConfig config;
  std::set<std::string> names;
  for (const ConfigKey& key : keys(config)) EXPECT_TRUE(names.insert(key.name).second) << key.name;
}

}  // namespace
}  // namespace sparsek::train
