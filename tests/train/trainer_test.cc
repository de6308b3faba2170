// Whole runs of tiny models: ended and resumed they give the same bits; damaged checkpoints, full disks and broken
// losses are survived; what is exported computes what was trained; adaptation leaves the base as it was.
#include "train/trainer.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/folder_lock.h"
#include "model/adapter.h"
#include "model/transformer.h"
#include "tests/model/tiny_model.h"
#include "train/batches.h"
#include "train/checkpoint_folder.h"
#include "train/session.h"
#include "train/token_loss.h"
#include "train/warm_start.h"

namespace sparsek::train {
namespace {

namespace fs = std::filesystem;
using sparsek::test::message_of;
using sparsek::test::TemporaryFolder;
using testing::AllOf;
using testing::HasSubstr;

// Recall on a tiny model: dim 32, 2 layers, rows of 64.
TrainConfig tiny_config(const std::string& folder, const std::vector<std::string>& more = {}) {
  std::vector<std::string> overrides = {
      "data.task=recall",        "data.recall_pairs=3",   "data.recall_keys=6", "data.recall_values=6",
      "data.recall_noise=6",     "data.batch=2",          "data.seqlen=64",     "model.vocab_size=61",
      "model.num_layers=2",      "model.dim=32",          "model.ffn_dim=48",   "model.num_heads=4",
      "model.num_kv_heads=2",    "model.head_dim=8",      "model.init_std=0.1", "attention.topk=6",
      "attention.window_size=8", "attention.num_sinks=1", "scorer.hidden=8",    "optimiser.warmup_steps=2",
      "optimiser.lr=3e-3",       "run.dtype=f32",         "run.steps=6",        "run.log_every=1",
      "validation.every=3",      "validation.batches=4",  "checkpoint.every=2", "run.folder=" + folder};
  overrides.insert(overrides.end(), more.begin(), more.end());
  return load_config("", overrides);
}

// Stops after `steps` steps of this call.
Observer stop_after(int64_t steps) {
  auto seen = std::make_shared<int64_t>(0);
  Observer observer;
  observer.on_step = [seen](const StepReport&) { ++*seen; };
  observer.should_stop = [seen, steps] { return *seen >= steps; };
  return observer;
}

void expect_same_bits(const std::string& a, const std::string& b, int64_t step) {
  const Checkpoint x = CheckpointFolder(a + "/checkpoints").load(step);
  const Checkpoint y = CheckpointFolder(b + "/checkpoints").load(step);
  ASSERT_EQ(x.tensors.size(), y.tensors.size());
  for (const auto& [name, tensor] : x.tensors) EXPECT_TRUE(tensor.equal(y.tensors.at(name))) << name;
  for (const char* key : {"step", "tokens", "skipped", "applied", "data"}) {
    EXPECT_EQ(x.state.at(key), y.state.at(key)) << key;
  }
}

struct Case {
  const char* name;
  std::vector<std::string> overrides;
  bool has_base = false;
};
class Resumed : public testing::TestWithParam<Case> {};

TEST_P(Resumed, GivesTheSameBits) {
  const TemporaryFolder folder;
  std::vector<std::string> more = GetParam().overrides;
  if (GetParam().has_base) {
    fs::create_directory(folder.file("base"));
    sparsek::test::tiny_llama().write(folder.file("base"));
    more.push_back("model.base=" + folder.file("base"));
  }
  const TrainResult whole = train(tiny_config(folder.file("a"), more), {}, {});
  EXPECT_TRUE(whole.is_complete);
  const TrainConfig config = tiny_config(folder.file("b"), more);
  EXPECT_FALSE(train(config, {}, stop_after(1)).is_complete);
  EXPECT_FALSE(train(config, {.newest = true}, stop_after(2)).is_complete);
  const TrainResult resumed = train(config, {.newest = true}, {});
  EXPECT_TRUE(resumed.is_complete);
  EXPECT_EQ(whole.loss, resumed.loss);
  ASSERT_TRUE(whole.validation.has_value() && resumed.validation.has_value());
  EXPECT_EQ(whole.validation->loss, resumed.validation->loss);
  expect_same_bits(folder.file("a"), folder.file("b"), 6);
  // One line a step, none twice.
  std::ifstream metrics(folder.file("b/metrics.jsonl"));
  std::vector<int64_t> steps;
  for (std::string line; std::getline(metrics, line);) steps.push_back(nlohmann::json::parse(line).at("step"));
  EXPECT_THAT(steps, testing::ElementsAre(1, 2, 3, 4, 5, 6));
}

INSTANTIATE_TEST_SUITE_P(
    Runs, Resumed,
    testing::Values(Case{"whole", {}}, Case{"plain", {"trainable.recompute=false", "optimiser.accumulation=2"}},
                    Case{"bf16", {"run.dtype=bf16"}},
                    Case{"recurrent", {"recurrent.chunk=24", "recurrent.bptt_chunks=2"}},
                    Case{"recurrent_window", {"recurrent.chunk=16", "attention.kind=window"}},
                    Case{"recurrent_dense", {"recurrent.chunk=16", "attention.kind=dense", "recurrent.dense_cache=20"}},
                    Case{"annealed", {"schedule.anneal_steps=4", "schedule.topk_from=12", "schedule.window_from=12"}},
                    Case{"layers", {"attention.layers=4+10, 9+3", "recurrent.chunk=24"}},
                    Case{"layers_warm", {"attention.layers=4+10, 9+3", "warm_start.steps=2"}, true},
                    Case{"scorer_kl", {"trainable.part=scorer", "loss.kl=1", "loss.next_token=0"}, true},
                    Case{"scorer_kl_recurrent", {"trainable.part=scorer", "loss.kl=1", "recurrent.chunk=24"}, true},
                    Case{"lookup_heads", {"trainable.part=scorer", "loss.kl=1", "scorer.lookup_heads=3"}, true},
                    Case{"lora_both", {"trainable.part=lora", "loss.kl=0.5", "trainable.lora_rank=3"}, true},
                    Case{"full_kl", {"loss.kl=0.5", "warm_start.steps=2"}, true}),
    [](const auto& info) { return info.param.name; });

// Two chunks of 16 do not reach the questions at the end of a row: no loss of 0 that nobody measured.
TEST(Trainer, ValidationWithoutTargetsMeasuresNothing) {
  const TemporaryFolder folder;
  std::vector<std::string> notices;
  Observer observer;
  observer.notice = [&](const std::string& text) { notices.push_back(text); };
  const TrainConfig config = tiny_config(folder.file("run"), {"recurrent.chunk=16", "validation.batches=2"});
  EXPECT_FALSE(train(config, {}, observer).validation.has_value());
  EXPECT_THAT(notices, testing::Contains(HasSubstr("no target")));
}

TEST(Trainer, LossFalls) {
  const TemporaryFolder folder;
  std::vector<double> losses;
  Observer observer;
  observer.on_step = [&](const StepReport& report) { losses.push_back(report.loss); };
  train(tiny_config(folder.file("run"), {"run.steps=60", "data.batch=8", "checkpoint.every=0"}), {}, observer);
  EXPECT_LT(losses.back(), losses.front() - 1);
}

TEST(Trainer, RefusesWhatWouldBeLost) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"));
  train(config, {}, {});
  EXPECT_THAT(message_of<UsageError>([&] { train(config, {}, {}); }),
              AllOf(HasSubstr("step 6"), HasSubstr("--resume")));
  // A finished run resumes to its own end.
  EXPECT_TRUE(train(config, {.newest = true}, {}).is_complete);
}

TEST(Trainer, OneRunAFolder) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"));
  {
    const FolderLock other(folder.file("run"));
    EXPECT_THAT(message_of<DataError>([&] { train(config, {}, {}); }),
                AllOf(HasSubstr("run: "), HasSubstr("another run")));
  }
  EXPECT_TRUE(train(config, {}, {}).is_complete);
}

TEST(Trainer, FinishedRunSaysWhatItMeasured) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"));
  const auto card = [&] {
    std::ifstream file(folder.file("run/model/README.md"));
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  const TrainResult whole = train(config, {}, {});
  const std::string said = card();
  EXPECT_THAT(said, HasSubstr("validation: loss "));
  const TrainResult again = train(config, {.newest = true}, {});
  EXPECT_TRUE(again.is_complete);
  EXPECT_EQ(whole.loss, again.loss);
  ASSERT_TRUE(again.validation.has_value());
  EXPECT_EQ(whole.validation->loss, again.validation->loss);
  EXPECT_EQ(said, card());
}

TEST(Trainer, OtherModelsCheckpoint) {
  const TemporaryFolder folder;
  train(tiny_config(folder.file("run")), {}, {});
  EXPECT_THAT(
      message_of<DataError>(
          [&] { train(tiny_config(folder.file("run"), {"model.ffn_dim=56"}), {.newest = true}, {}); }),
      AllOf(HasSubstr("step-00000006: tensor"), HasSubstr("gate_up"), HasSubstr("[112, 32]"), HasSubstr("[96, 32]")));
}

TEST(Trainer, DamagedCheckpointNamesTheOneBefore) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"));
  train(config, {}, {});
  const std::string newest = folder.file("run/checkpoints/step-00000006");
  for (const char* file : {"/tensors.safetensors", "/state.json"}) {
    const auto bytes = [&] {
      std::ifstream in(newest + file, std::ios::binary);
      return std::string{std::istreambuf_iterator<char>(in), {}};
    }();
    for (const size_t at : {bytes.size() / 2, bytes.size() - 5}) {
      std::string damaged = bytes;
      damaged[at] = static_cast<char>(damaged[at] ^ 1);
      std::ofstream(newest + file, std::ios::binary) << damaged;
      EXPECT_THAT(
          message_of<DataError>([&] { train(config, {.newest = true}, {}); }),
          AllOf(HasSubstr(newest + file), HasSubstr("damaged"), HasSubstr("--checkpoint"), HasSubstr("step-00000004")));
    }
    std::ofstream(newest + file, std::ios::binary) << bytes.substr(0, bytes.size() / 2);
    EXPECT_THAT(message_of<DataError>([&] { train(config, {.newest = true}, {}); }), HasSubstr("step-00000004"));
    std::ofstream(newest + file, std::ios::binary) << bytes;
  }
  fs::rename(newest + "/state.json", newest + "/kept");
  fs::create_directory(newest + "/state.json");
  for (const std::string& named : {std::string(), newest, newest + "/"}) {
    EXPECT_THAT(message_of<DataError>([&] { train(config, {.newest = named.empty(), .checkpoint = named}, {}); }),
                AllOf(HasSubstr("state.json: expected a text, found a directory"), HasSubstr("--checkpoint"),
                      HasSubstr("step-00000004")));
  }
  fs::remove(newest + "/state.json");
  fs::rename(newest + "/kept", newest + "/state.json");
  for (const char* suffix : {".part", ".old/"}) {
    EXPECT_THAT(message_of<DataError>([&] { train(config, {.checkpoint = newest + suffix}, {}); }),
                AllOf(HasSubstr("half written or removed"), HasSubstr("--checkpoint"), HasSubstr("step-00000004")));
  }
  fs::resize_file(newest + "/tensors.safetensors", 100);
  const TrainResult result = train(config, {.checkpoint = folder.file("run/checkpoints/step-00000004")}, {});
  EXPECT_TRUE(result.is_complete);
  EXPECT_NO_THROW(load_checkpoint(newest));  // written again
}

TEST(Trainer, KeepsTheNewest) {
  const TemporaryFolder folder;
  train(tiny_config(folder.file("run"), {"checkpoint.every=1", "checkpoint.keep=2"}), {}, {});
  EXPECT_THAT(CheckpointFolder(folder.file("run/checkpoints")).steps(), testing::ElementsAre(5, 6));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.file("run/checkpoints")), {}), 2);
}

TEST(Trainer, RemovesWhatAKillLeftBehind) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"));
  train(config, {}, stop_after(2));
  const std::string checkpoints = folder.file("run/checkpoints/");
  for (const char* name : {"step-00000004.part", "step-00000001.old", "mine.part"}) {
    fs::create_directory(checkpoints + name);
    std::ofstream(checkpoints + name + "/tensors.safetensors") << "half";
  }
  train(config, {.newest = true}, stop_after(1));
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(checkpoints)) names.push_back(entry.path().filename());
  EXPECT_THAT(names, testing::UnorderedElementsAre("step-00000002", "step-00000003", "mine.part"));
}

// A run that went back: what it saves is the newest, whatever the run that was given up had saved.
TEST(Trainer, GoingBackGivesUpLaterCheckpoints) {
  const TemporaryFolder folder;
  const CheckpointFolder checkpoints(folder.file("run/checkpoints"));
  train(tiny_config(folder.file("run")), {}, {});
  EXPECT_THAT(checkpoints.steps(), testing::ElementsAre(2, 4, 6));
  const TrainConfig config = tiny_config(folder.file("run"), {"checkpoint.keep=1"});
  train(config, {.checkpoint = checkpoints.path_of(2)}, stop_after(1));
  EXPECT_THAT(checkpoints.steps(), testing::ElementsAre(3));
}

TEST(Trainer, CarriedRowsStayAsMany) {
  const TemporaryFolder folder;
  train(tiny_config(folder.file("run"), {"recurrent.chunk=24"}), {}, stop_after(1));
  for (const char* batch : {"data.batch=1", "data.batch=3"}) {
    const TrainConfig config = tiny_config(folder.file("run"), {"recurrent.chunk=24", batch});
    EXPECT_THAT(message_of<UsageError>([&] { train(config, {.newest = true}, {}); }),
                AllOf(HasSubstr("data.batch"), HasSubstr("expected 2")));
  }
}

// A limit on the size of files fails like a full disk: what the call says then.
std::string message_on_a_disk_of(rlim_t bytes, const TrainConfig& config, const Resume& resume) {
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit small{bytes, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &small);
  const std::string message = message_of<WriteError>([&] { train(config, resume, {}); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  return message;
}

TEST(Trainer, FullDiskLosesNothing) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"));
  train(config, {}, stop_after(2));
  for (const auto& [bytes, file] : {std::pair<rlim_t, const char*>{60000, "tensors.safetensors"},
                                    {10000, "tensors.safetensors"},
                                    {20, "config.toml"}}) {
    EXPECT_THAT(message_on_a_disk_of(bytes, config, {.newest = true}),
                AllOf(HasSubstr(file), HasSubstr("step-00000002 is whole: put this right, then --resume")));
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.file("run/checkpoints")), {}), 1);
  train(config, {.newest = true}, {});
  train(tiny_config(folder.file("other")), {}, {});
  expect_same_bits(folder.file("run"), folder.file("other"), 6);
  // A run that went back says where it was, not what the run that was given up left.
  const std::string back = folder.file("run/checkpoints/step-00000004");
  EXPECT_THAT(message_on_a_disk_of(60000, config, {.checkpoint = back}),
              HasSubstr("step-00000004 is whole: put this right, then --checkpoint " + back));
}

// A place that nothing can be written to, unlike a tokenizer that cannot be read, is no detail of the export.
TEST(Trainer, TokenizerThatCannotBeWritten) {
  const TemporaryFolder folder;
  fs::create_directory(folder.file("base"));
  sparsek::test::tiny_llama().write(folder.file("base"));
  std::ofstream(folder.file("base/tokenizer.json")) << "{}";
  fs::create_directories(folder.file("run/model/tokenizer.json/full"));
  const TrainConfig config = tiny_config(folder.file("run"), {"model.base=" + folder.file("base")});
  EXPECT_THAT(message_of<WriteError>([&] { train(config, {}, {}); }),
              AllOf(HasSubstr("tokenizer.json"), HasSubstr("step-00000006 is whole")));
  fs::remove_all(folder.file("run/model/tokenizer.json"));
  EXPECT_TRUE(train(config, {.newest = true}, {}).is_complete);
  EXPECT_TRUE(fs::is_regular_file(folder.file("run/model/tokenizer.json")));
}

TEST(Trainer, BrokenLossStopsTheRun) {
  const TemporaryFolder folder;
  sparsek::test::TinyModel base = sparsek::test::tiny_llama();
  for (float& value : base.tensors.at("model.norm.weight").values) value = 3e38f;
  base.write(folder.path());
  int64_t skipped = 0;
  Observer observer;
  observer.on_step = [&](const StepReport& report) { skipped = report.skipped_steps; };
  const TrainConfig config =
      tiny_config(folder.file("run"), {"model.base=" + folder.path(), "run.steps=100", "attention.kind=window"});
  EXPECT_THAT(message_of<DataError>([&] { train(config, {}, observer); }), HasSubstr("not finite 50 times in a row"));
  EXPECT_EQ(skipped, 49);
}

TEST(Trainer, GoesOnAfterAValidationThatWasNotFinite) {
  const TemporaryFolder folder;
  sparsek::test::TinyModel base = sparsek::test::tiny_llama();
  for (float& value : base.tensors.at("model.norm.weight").values) value = 3e38f;
  base.write(folder.path());
  const TrainConfig config = tiny_config(folder.file("run"), {"model.base=" + folder.path(), "attention.kind=window"});
  const TrainResult begun = train(config, {}, stop_after(3));
  ASSERT_TRUE(begun.validation.has_value());
  EXPECT_FALSE(std::isfinite(begun.validation->loss));
  const TrainResult result = train(config, {.newest = true}, {});
  EXPECT_TRUE(result.is_complete);
  EXPECT_EQ(result.skipped_steps, 6);
}

TEST(Trainer, VocabularyMustFit) {
  const TemporaryFolder folder;
  EXPECT_THAT(message_of<DataError>([&] { train(tiny_config(folder.file("run"), {"model.vocab_size=17"}), {}, {}); }),
              AllOf(HasSubstr("17"), HasSubstr("18")));
}

// With a base model.num_layers says nothing, about how far a window passes something on either.
TEST(Trainer, RecallsGapIsOfTheBasesLayers) {
  const TemporaryFolder folder;
  sparsek::test::tiny_llama().write(folder.path());
  const TrainConfig config = tiny_config(folder.file("run"), {"model.base=" + folder.path(), "model.num_layers=50"});
  EXPECT_NO_THROW(open_batches(config, Split::kTrain));
}

TEST(Trainer, BudgetsAreOfEveryLayer) {
  const TemporaryFolder folder;
  EXPECT_THAT(message_of<UsageError>(
                  [&] { train(tiny_config(folder.file("run"), {"attention.layers=4+10, 9+3, 9+3"}), {}, {}); }),
              AllOf(HasSubstr("attention.layers"), HasSubstr("of 2 layers, found 3")));
  train(tiny_config(folder.file("run"), {"attention.layers=4+10, 9+3", "attention.num_sinks=1"}), {}, {});
  const model::Adapter adapter = model::load_adapter(folder.file("run/model/adapter.safetensors"),
                                                     model::read_model_config(folder.file("run/model")));
  EXPECT_EQ(adapter.attention.layers, (std::vector<model::LayerBudget>{{4, 10}, {9, 3}}));
  EXPECT_EQ(adapter.attention.topk, 7);
  EXPECT_EQ(adapter.attention.window_size, 7);
  EXPECT_EQ(adapter.attention.far_distance, 15);
}

// The base itself as teacher is what there is without one; another model teaches something else.
TEST(Trainer, TeacherMayBeAnotherModel) {
  const TemporaryFolder folder;
  sparsek::test::TinyModel model = sparsek::test::tiny_llama();
  for (const char* name : {"base", "other", "words"}) fs::create_directory(folder.file(name));
  model.write(folder.file("base"));
  for (float& value : model.tensors.at("model.norm.weight").values) value *= 2;
  model.write(folder.file("other"));
  const auto kl = [&](const std::string& teacher) {
    const std::string run = "run-" + (teacher.empty() ? "none" : teacher);
    std::vector<std::string> more = {"model.base=" + folder.file("base"), "loss.kl=1", "run.steps=1"};
    if (!teacher.empty()) more.push_back("loss.teacher=" + folder.file(teacher));
    double found = -1;
    Observer observer;
    observer.on_step = [&](const StepReport& report) { found = report.kl; };
    train(tiny_config(folder.file(run), more), {}, observer);
    return found;
  };
  const double own = kl("");
  EXPECT_EQ(kl("base"), own);
  EXPECT_GT(kl("other"), 1.5 * own);

  model.config["vocab_size"] = 60;
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"}) {
    if (const auto it = model.tensors.find(name); it != model.tensors.end()) {
      it->second.shape[0] = 60;
      it->second.values.resize(60 * 32);
    }
  }
  model.write(folder.file("words"));
  EXPECT_THAT(message_of<UsageError>([&] { kl("words"); }),
              AllOf(HasSubstr("loss.teacher"), HasSubstr("vocabulary of 61"), HasSubstr("found 60")));
}

TEST(Trainer, LookupHeadsAreTheBases) {
  const TemporaryFolder folder;
  sparsek::test::tiny_llama().write(folder.path());
  const auto config = [&](const char* heads) {
    return tiny_config(folder.file("run"), {"model.base=" + folder.path(), "trainable.part=scorer", "scorer.slope=0.5",
                                            "scorer.lookup_slope=0.25", std::string("scorer.lookup_heads=") + heads});
  };
  EXPECT_THAT(message_of<UsageError>([&] { train(config("1000"), {}, {}); }),
              AllOf(HasSubstr("scorer.lookup_heads"), HasSubstr("at most"), HasSubstr("1000")));
  EXPECT_THAT(
      message_of<UsageError>([&] { check_config(load_config("", {"data.task=recall", "scorer.lookup_heads=2"})); }),
      HasSubstr("expected 0 without model.base"));
  std::vector<std::string> notices;
  Observer observer;
  observer.notice = [&](const std::string& text) { notices.push_back(text); };
  train(config("1"), {}, observer);
  EXPECT_THAT(notices, testing::Contains(HasSubstr("heads that look things up")));
  // One head has the slope it was given, the others have moved.
  const auto count = [&](const char* run, double slope) {
    int64_t found = 0;
    for (const auto& [name, tensor] :
         CheckpointFolder(folder.file(std::string(run) + "/checkpoints")).load(6).tensors) {
      if (name.starts_with("parameter.") && name.ends_with(".slope")) found += tensor.eq(slope).sum().item<int64_t>();
    }
    return found;
  };
  EXPECT_EQ(count("run", 0.25), 1);
  EXPECT_EQ(count("run", 0.5), 0);
  // On from a run that held none.
  TrainConfig later = config("0");
  later.run.folder = folder.file("later");
  train(later, {}, stop_after(3));
  later.scorer.lookup_heads = 2;
  EXPECT_TRUE(train(later, {.newest = true}, {}).is_complete);
  EXPECT_EQ(count("later", 0.25), 2);
}

TEST(Trainer, DeviceMustBeThere) {
  const TemporaryFolder folder;
  for (const char* device : {"cuda", "tpu", "cuda:x"}) {
    EXPECT_THAT(message_of<UsageError>(
                    [&] { train(tiny_config(folder.file("run"), {std::string("run.device=") + device}), {}, {}); }),
                HasSubstr("run.device"));
  }
}

// Inference over what was written gives the losses that the trainer saw in validation.
double inference_loss(const model::LoadOptions& options, const TrainConfig& config) {
  const model::Transformer model = model::Transformer::load(options);
  const auto source = open_batches(config, Split::kValidation);
  double sum = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < config.validation.batches; ++i) {
    const Batch batch = source->next();
    for (int64_t row = 0; row < batch.ids.size(0); ++row) {
      model::DecodeState state = model.new_state();
      const at::Tensor hidden = model.forward(batch.ids[row].to(at::kInt), state);
      const at::Tensor targets = batch.targets[row];
      const std::vector<double> losses = model.losses(hidden, targets.clamp_min(0).to(at::kInt));
      for (int64_t t = 0; t < targets.size(0); ++t) {
        if (targets[t].item<int64_t>() == kIgnored) continue;
        sum += losses[t];
        ++count;
      }
    }
  }
  return sum / static_cast<double>(count);
}

TEST(Export, ComputesWhatWasTrained) {
  const TemporaryFolder folder;
  fs::create_directory(folder.file("base"));
  sparsek::test::tiny_llama().write(folder.file("base"));
  for (const std::vector<std::string>& more :
       {std::vector<std::string>{},
        {"model.base=" + folder.file("base"), "trainable.part=lora", "optimiser.lr=0.02"},
        {"model.base=" + folder.file("base"), "trainable.part=scorer"}}) {
    const std::string run = folder.file("run" + std::to_string(more.size()));
    const TrainConfig config = tiny_config(run, more);
    const TrainResult result = train(config, {}, {});
    const bool has_model = config.trainable.part != "scorer";
    EXPECT_EQ(fs::exists(result.exported + "/config.json"), has_model);
    const double loss = inference_loss(
        {.path = has_model ? result.exported : folder.file("base"),
         .attention = {.kind = model::AttentionKind::kSparsek, .scorer = result.exported + "/adapter.safetensors"},
         .placement = {.dtype = at::kFloat}},
        config);
    EXPECT_NEAR(loss, result.validation->loss, 2e-5) << config.trainable.part;
    std::ifstream card(result.exported + "/README.md");
    const std::string said{std::istreambuf_iterator<char>(card), {}};
    const bool has_base = !config.model.base.empty();
    EXPECT_EQ(said.find("tokenizer: none: ") != said.npos, has_model && has_base) << "a base without a tokenizer";
    EXPECT_EQ(said.find("tokenizer: none, as there is no base") != said.npos, !has_base);
  }
}

// The card says what the scorers are, not what the configuration would have made.
TEST(Export, CardSaysTheAdaptersWidth) {
  const TemporaryFolder folder;
  fs::create_directory(folder.file("base"));
  sparsek::test::tiny_llama().write(folder.file("base"));
  const std::vector<std::string> base = {"model.base=" + folder.file("base"), "trainable.part=scorer"};
  train(tiny_config(folder.file("first"), base), {}, {});
  train(tiny_config(folder.file("second"), {base[0], base[1], "scorer.hidden=16",
                                            "scorer.adapter=" + folder.file("first/model/adapter.safetensors")}),
        {}, {});
  std::ifstream card(folder.file("second/model/README.md"));
  EXPECT_THAT(std::string(std::istreambuf_iterator<char>(card), {}), HasSubstr("MLP of 8,"));
}

TEST(WarmStart, NothingToFitIsSaid) {
  const TemporaryFolder folder;
  sparsek::test::tiny_llama().write(folder.path());
  const TrainConfig config = tiny_config(folder.file("run"), {"model.base=" + folder.path(), "trainable.part=scorer",
                                                              "warm_start.steps=2", "recurrent.chunk=8"});
  EXPECT_THAT(message_of<DataError>([&] { train(config, {}, {}); }),
              AllOf(HasSubstr("warm start"), HasSubstr("longer than the smallest window of 8")));
}

TEST(WarmStart, FutureMassOfPlainAttention) {
  at::manual_seed(3);
  AttentionInputs in;
  in.q = at::randn({2, 20, 4, 8}, at::kDouble);
  in.k = at::randn({2, 20, 2, 8}, at::kDouble);
  const at::Tensor a = in.q[1].select(1, 3).mm(in.k[1].select(1, 1).t()).div(std::sqrt(8.0));  // head 3, KV head 1
  const at::Tensor b = in.q[1].select(1, 2).mm(in.k[1].select(1, 1).t()).div(std::sqrt(8.0));
  for (const int64_t block : {3, 7, 20, 64}) {
    const FutureMass mass = future_mass(in, 6, block);
    for (const int64_t key : {0, 5, 13, 14}) {
      double sum = 0;
      for (int64_t query = key + 6; query < 20; ++query) {
        for (const at::Tensor& logits : {a, b}) {
          const at::Tensor row = logits[query].narrow(0, 0, query + 1).softmax(0);
          sum += row[key].item<double>();
        }
      }
      const auto count = static_cast<double>(std::max<int64_t>(14 - key, 0));
      EXPECT_EQ(mass.counts[key].item<double>(), count);
      EXPECT_NEAR(mass.log_mass[1][key][1].item<double>(), std::log(sum / std::max(count, 1.0) + 1e-9), 1e-9)
          << "key " << key << " block " << block;
    }
  }
}

TEST(WarmStart, FitsTheScorers) {
  const TemporaryFolder folder;
  sparsek::test::tiny_llama().write(folder.path());
  const TrainConfig config =
      tiny_config(folder.file("run"), {"model.base=" + folder.path(), "trainable.part=scorer", "warm_start.steps=121",
                                       "warm_start.lr=3e-2", "data.batch=8"});
  Session session = open_session(config);
  const auto batches = open_batches(config, Split::kTrain);
  std::vector<double> errors;
  const auto notice = [&](const std::string& text) { errors.push_back(std::stod(text.substr(text.rfind(' ')))); };
  EXPECT_TRUE(warm_start(session, config, *batches, notice, [] { return false; }));
  ASSERT_GE(errors.size(), 2u);
  EXPECT_LT(errors.back(), 0.5 * errors.front());
  EXPECT_EQ(batches->position(), "0");
}

}  // namespace
}  // namespace sparsek::train
