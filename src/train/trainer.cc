#include "train/trainer.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include <chrono>
#include <cmath>
#include <filesystem>

#include "base/atomic_file.h"
#include "base/folder_lock.h"
#include "base/saturate.h"
#include "data/quote.h"
#include "data/weight_view.h"
#include "train/batches.h"
#include "train/checkpoint_folder.h"
#include "train/device_memory.h"
#include "train/export.h"
#include "train/lookup_heads.h"
#include "train/metrics.h"
#include "train/optimiser.h"
#include "train/session.h"
#include "train/token_loss.h"
#include "train/warm_start.h"

namespace sparsek::train {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMaxSkippedInARow = 50;  // then the run has broken down

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What chunks carry from one to the next: each row's document position, and one state a layer.
class Carried {
 public:
  explicit Carried(const Network& network) : network_(network) {}

  // Forward over the next chunk of every row.
  at::Tensor forward(const Batch& batch, const at::Tensor& ids) {
    const int64_t rows = ids.size(0), chunk = ids.size(1);
    if (states_.empty()) {
      states_ = network_.new_states(rows);
      fresh_ = states_;
      positions_.assign(rows, 0);
    }
    reset(batch.starts);
    const at::Tensor hidden = network_.forward(ids, network_.layout(rows, chunk, {}, positions_), &states_);
    for (int64_t& position : positions_) position += chunk;
    return hidden;
  }
  void detach() {
    for (LayerState& state : states_) state = detached(state);
  }
  // As if a document began in every row: NaN that a state took up would stay until its document ends.
  void forget() {
    states_ = fresh_;
    std::fill(positions_.begin(), positions_.end(), 0);
  }

  void save(const std::string& name, NamedTensors& tensors, nlohmann::json& state) const {
    state[name] = positions_;
    for (size_t i = 0; i < states_.size(); ++i) {
      const Tensors members = tensors_of(states_[i]);
      for (size_t m = 0; m < members.size(); ++m) {
        tensors.emplace_back(fmt::format("{}.{}.{}", name, i, m), members[m].detach());
      }
    }
  }
  void load(const std::string& name, const Checkpoint& from, int64_t rows) {
    positions_ = from.state.at(name).get<std::vector<int64_t>>();
    if (positions_.empty()) return;
    if (static_cast<int64_t>(positions_.size()) != rows) {
      throw_field("data.batch", "expected {} as in the checkpoint, whose rows are in the middle of documents, found {}",
                  positions_.size(), rows);
    }
    const at::NoGradGuard no_grad;
    fresh_ = network_.new_states(static_cast<int64_t>(positions_.size()));
    states_ = fresh_;
    for (size_t i = 0; i < states_.size(); ++i) {
      Tensors members = tensors_of(states_[i]);
      for (size_t m = 0; m < members.size(); ++m) {
        const at::Tensor& saved = from.tensors.at(fmt::format("{}.{}.{}", name, i, m));
        if (saved.sizes() != members[m].sizes()) {
          throw_data("{}: tensor {}.{}.{}: expected shape {}, found {}", from.path, name, i, m,
                     shape_text(members[m].sizes()), shape_text(saved.sizes()));
        }
        members[m] = saved.to(members[m].device());
      }
      states_[i] = with_tensors(states_[i], members);
    }
  }

 private:
  void reset(const std::vector<uint8_t>& starts) {
    int64_t count = 0;
    for (size_t row = 0; row < positions_.size(); ++row) {
      if (!starts.empty() && starts[row] == 0) continue;
      positions_[row] = 0;
      ++count;
    }
    if (count == 0) return;
    if (count == static_cast<int64_t>(positions_.size())) {
      states_ = fresh_;
      return;
    }
    std::vector<uint8_t> flags = starts;
    const at::Tensor mask = at::from_blob(flags.data(), {static_cast<int64_t>(flags.size())}, at::kByte)
                                .to(network_.options().device, at::kBool);
    for (size_t i = 0; i < states_.size(); ++i) states_[i] = reset_rows(states_[i], fresh_[i], mask);
  }

  const Network& network_;
  std::vector<LayerState> states_, fresh_;
  std::vector<int64_t> positions_;
};

class Run {
 public:
  Run(const TrainConfig& config, const Observer& observer)
      : config_(config),
        observer_(observer),
        session_(open_session(config)),
        train_(open_batches(config, Split::kTrain)),
        validation_(open_batches(config, Split::kValidation)),
        validation_begin_(validation_->position()),
        optimiser_(session_.network.parameters(), config.optimiser, config.run.steps, config.scorer.largest_slope),
        folder_(config.run.folder + "/checkpoints"),
        carried_(session_.network) {
    if (exports_model()) check_exportable(session_.network.config(), config.model.base);
    const int64_t vocab_size = session_.network.config().vocab_size;
    const auto check_vocabulary = [&](const char* what, const BatchSource& source) {
      if (source.vocab_size() <= vocab_size) return;
      throw_data("{}: expected ids below the model's vocabulary of {}, found a vocabulary of {}", what, vocab_size,
                 source.vocab_size());
    };
    check_vocabulary("data", *train_);
    check_vocabulary("data.validation", *validation_);
    if (holds_lookup_heads(config)) hold_lookup_heads();
    if (learns_from_teacher(config)) teacher_carried_.emplace(*session_.teacher);
  }

  TrainResult operator()(const Resume& resume) {
    begin(resume);
    try {
      return run();
    } catch (const WriteError& error) {
      throw WriteError(fmt::format("{}; {}", error.what(), how_to_go_on()));
    }
  }

 private:
  TrainResult run() {
    write_file_atomically(config_.run.folder + "/config.toml", config_text(config_));
    metrics_.emplace(config_.run.folder + "/metrics.jsonl", step_);
    observer_.notice(fmt::format("{} learned parameters of {}", optimiser_.num_parameters(),
                                 session_.network.config().num_parameters()));
    note_repeated_validation();
    if (step_ == 0 && config_.warm_start.steps > 0 && !was_resumed_) {
      if (!warm_start(session_, config_, *train_, observer_.notice, observer_.should_stop)) return stopped();
    }
    if (!learns_from_teacher(config_)) session_.teacher.reset();
    Clock::time_point interval_begin = Clock::now();
    int64_t interval_tokens = 0, interval_steps = 0, skipped_in_a_row = 0;
    while (step_ < config_.run.steps) {
      const int64_t tokens_before = tokens_;
      StepReport report = one_step();
      interval_tokens += tokens_ - tokens_before;
      ++interval_steps;
      skipped_in_a_row = was_applied_ ? 0 : skipped_in_a_row + 1;
      if (skipped_in_a_row >= kMaxSkippedInARow) {
        throw_data(
            "step {}: the loss or a gradient was not finite {} times in a row; lower optimiser.lr, or go on from "
            "an older checkpoint",
            step_, skipped_in_a_row);
      }
      const bool is_last = step_ == config_.run.steps;
      const bool validates = config_.validation.every > 0 && (is_last || step_ % config_.validation.every == 0);
      const bool logs = is_last || step_ % config_.run.log_every == 0 || validates;
      if (logs) {
        const double seconds = seconds_since(interval_begin);
        seconds_per_step_ = seconds / static_cast<double>(interval_steps);
        tokens_per_second_ = static_cast<double>(interval_tokens) / seconds;
      }
      report.tokens_per_second = tokens_per_second_;
      report.seconds_left = seconds_per_step_ * static_cast<double>(config_.run.steps - step_);
      report.memory_bytes = peak_memory_bytes(session_.network.options().device);
      if (validates) report.validation = last_validation_ = validate();
      if (logs) {
        metrics_->append(report);
        interval_begin = Clock::now();
        interval_tokens = interval_steps = 0;
      }
      observer_.on_step(report);
      last_loss_ = report.loss;
      const bool stops = !is_last && observer_.should_stop();
      if (is_last || stops || (config_.checkpoint.every > 0 && step_ % config_.checkpoint.every == 0)) save();
      if (stops) return stopped();
    }
    TrainResult result = stopped();
    result.is_complete = true;
    result.exported = export_all();
    return result;
  }

  void note_repeated_validation() const {
    const std::optional<int64_t> rows = validation_->rows_per_epoch();
    const int64_t asked = saturating_multiply(config_.validation.batches, config_.data.batch);
    if (config_.validation.every == 0 || !rows || asked <= *rows) return;
    observer_.notice(fmt::format(
        "validation: {} batches of {} rows are {} rows, the held-out text fills {}: some count more than once",
        config_.validation.batches, config_.data.batch, asked, *rows));
  }

  // Where scorers alone are learned the base stays what it was.
  bool exports_model() const { return config_.trainable.part != "scorer"; }

  // The dense base (or loss.teacher) says which heads; the text is validation's, so that a resumed run looks at the
  // same.
  void hold_lookup_heads() {
    constexpr int64_t kTokens = 512;
    const model::ModelConfig& model = session_.network.config();
    if (const int64_t most = model.num_layers * model.num_kv_heads; config_.scorer.lookup_heads > most) {
      throw_field("scorer.lookup_heads", "expected at most {}, the base's KV heads, found {}", most,
                  config_.scorer.lookup_heads);
    }
    const at::Tensor row = validation_->next().ids[0];
    validation_->seek(validation_begin_);
    const at::Tensor scores = lookup_scores(*session_.teacher, row.slice(0, 0, kTokens));
    std::string names;
    lookup_heads_ = highest_heads(scores, config_.scorer.lookup_heads);
    for (const HeadIndex& head : lookup_heads_) {
      names += fmt::format("{}{}.{} ({:.2f})", names.empty() ? "" : ", ", head.layer, head.kv_head,
                           scores[head.layer][head.kv_head].item<float>());
    }
    hold_slopes(session_.network.parameters(), lookup_heads_, config_.scorer.lookup_slope);
    observer_.notice(fmt::format("heads that look things up (layer.head, attention paid): {}", names));
  }

  // Where the run starts: nothing saved yet, the newest checkpoint, or a named one.
  void begin(const Resume& resume) {
    lock_.emplace(config_.run.folder);
    const std::vector<int64_t> saved = folder_.steps();
    if (!resume.checkpoint.empty()) {
      load(load_checkpoint(resume.checkpoint));
    } else if (resume.newest && !saved.empty()) {
      load(folder_.load(saved.back()));
    } else if (!saved.empty()) {
      throw_field("run.folder",
                  "expected a folder without checkpoints, found step {} in {}; go on with --resume, or "
                  "name another folder",
                  saved.back(), config_.run.folder);
    } else if (resume.newest) {
      observer_.notice("nothing to resume: starting at step 0");
    }
    folder_.remove_unfinished();
  }

  StepReport one_step() {
    const Sizes sizes = scheduled_sizes(config_, step_);
    if (config_.schedule.anneal_steps > 0) session_.network.set_sizes(sizes.topk, sizes.window_size);
    const bool is_recurrent = config_.recurrent.chunk > 0;
    const int64_t chunks = is_recurrent ? config_.recurrent.bptt_chunks : 1;
    // Read first: each token's weight in the loss is 1 / the step's number of targets.
    std::vector<Batch> batches;
    int64_t num_targets = 0;
    for (int64_t i = 0; i < config_.optimiser.accumulation * chunks; ++i) {
      batches.push_back(train_->next());
      num_targets += batches.back().num_targets;
      tokens_ += batches.back().ids.numel();
    }
    const double scale = 1.0 / static_cast<double>(std::max<int64_t>(num_targets, 1));
    at::Tensor next_token, kl;
    for (size_t first = 0; first < batches.size(); first += chunks) {
      at::Tensor total;
      for (int64_t c = 0; c < chunks; ++c) {
        const TokenLoss loss = batch_loss(batches[first + c]);
        total = total.defined() ? total.add(loss.total) : loss.total;
        next_token = next_token.defined() ? next_token.add(loss.next_token) : loss.next_token;
        kl = kl.defined() ? kl.add(loss.kl) : loss.kl;
      }
      if (total.requires_grad()) total.mul(scale).backward();
      if (is_recurrent) carried_.detach();
    }
    StepReport report;
    report.loss = next_token.item<double>() * scale;
    report.kl = kl.item<double>() * scale;
    const Optimiser::Step applied = optimiser_.apply(step_, std::isfinite(report.loss) && std::isfinite(report.kl));
    was_applied_ = applied.was_applied;
    if (!was_applied_) {
      ++skipped_;
      carried_.forget();
      if (teacher_carried_) teacher_carried_->forget();
    }
    ++step_;
    report.step = step_;
    report.steps = config_.run.steps;
    report.rate = applied.rate;
    report.gradient_norm = applied.gradient_norm;
    report.tokens = tokens_;
    report.skipped_steps = skipped_;
    return report;
  }

  LossWeights loss_weights() const { return {config_.loss.next_token, config_.loss.kl, config_.loss.rows}; }

  TokenLoss batch_loss(const Batch& batch) {
    const Network& network = session_.network;
    const at::Tensor ids = batch.ids.to(network.options().device);
    const at::Tensor targets = batch.targets.to(network.options().device).flatten();
    const bool is_recurrent = config_.recurrent.chunk > 0;
    const at::Tensor hidden = is_recurrent ? carried_.forward(batch, ids) : whole(network, batch, ids);
    Teacher teacher;
    if (session_.teacher && config_.loss.kl > 0) {
      const at::NoGradGuard no_grad;
      teacher.hidden =
          (is_recurrent ? teacher_carried_->forward(batch, ids) : whole(*session_.teacher, batch, ids)).flatten(0, 1);
      teacher.output = session_.teacher->parameters().output_matrix();
    }
    return token_loss(hidden.flatten(0, 1), network.parameters().output_matrix(), targets, loss_weights(), teacher);
  }

  static at::Tensor whole(const Network& network, const Batch& batch, const at::Tensor& ids) {
    return network.forward(ids, network.layout(ids.size(0), ids.size(1), batch.document_ends), nullptr);
  }

  // Nothing where the batches hold no target.
  std::optional<Evaluation> validate() {
    const at::NoGradGuard no_grad;
    const Network& network = session_.network;
    validation_->seek(validation_begin_);
    Carried carried(network);
    double loss = 0;
    int64_t hits = 0, targets = 0;
    for (int64_t i = 0; i < config_.validation.batches; ++i) {
      const Batch batch = validation_->next();
      const at::Tensor ids = batch.ids.to(network.options().device);
      const at::Tensor hidden = config_.recurrent.chunk > 0 ? carried.forward(batch, ids) : whole(network, batch, ids);
      const TokenScores scores = token_scores(hidden.flatten(0, 1), network.parameters().output_matrix(),
                                              batch.targets.to(network.options().device).flatten(), config_.loss.rows);
      loss += scores.losses.sum(at::kDouble).item<double>();
      hits += scores.hits.sum().item<int64_t>();
      targets += batch.num_targets;
    }
    if (targets == 0) {
      observer_.notice(
          fmt::format("validation: no target at position {} or later in {} batches, so nothing is measured",
                      config_.validation.from_position, config_.validation.batches));
      return std::nullopt;
    }
    const auto count = static_cast<double>(targets);
    return Evaluation{loss / count, static_cast<double>(hits) / count};
  }

  void save() {
    nlohmann::json state = {{"step", step_},
                            {"tokens", tokens_},
                            {"skipped", skipped_},
                            {"applied", optimiser_.num_applied()},
                            {"loss", last_loss_},
                            {"data", train_->position()},
                            {"data_fingerprint", train_->fingerprint()},
                            {"validation_fingerprint", validation_->fingerprint()},
                            {"config", config_text(config_)}};
    // JSON has no NaN: what was not finite counts as not measured.
    if (last_validation_ && std::isfinite(last_validation_->loss)) {
      state["validation"] = {last_validation_->loss, last_validation_->accuracy};
    }
    NamedTensors tensors = optimiser_.tensors();
    if (config_.recurrent.chunk > 0) {
      carried_.save("carried", tensors, state);
      if (teacher_carried_) teacher_carried_->save("teacher_carried", tensors, state);
    }
    folder_.save(step_, state, tensors, config_.checkpoint.keep);
    whole_checkpoint_ = folder_.path_of(step_);
  }

  // After a full disk, or what else stands in the way. A run that went back leaves later checkpoints, which may be
  // damaged, until it saves one.
  std::string how_to_go_on() const {
    if (whole_checkpoint_.empty()) return "nothing was saved yet";
    const std::vector<int64_t> saved = folder_.steps();
    const bool is_newest = !saved.empty() && folder_.path_of(saved.back()) == whole_checkpoint_;
    return fmt::format("{} is whole: put this right, then {}", whole_checkpoint_,
                       is_newest ? "--resume" : "--checkpoint " + whole_checkpoint_);
  }

  void load(const Checkpoint& checkpoint) {
    const at::NoGradGuard no_grad;
    whole_checkpoint_ = checkpoint.path;
    for (auto& [name, tensor] : optimiser_.tensors()) {
      const auto it = checkpoint.tensors.find(name);
      if (it == checkpoint.tensors.end() || it->second.sizes() != tensor.sizes()) {
        throw_data("{}: tensor {}: expected shape {}, found {}; it is another model's, or another part was learned",
                   checkpoint.path, name, shape_text(tensor.sizes()),
                   it == checkpoint.tensors.end() ? "none" : shape_text(it->second.sizes()));
      }
      at::Tensor(tensor).copy_(it->second);
    }
    // A checkpoint of a run that held other heads, or none, has moved these.
    for (const HeadIndex& head : lookup_heads_) {
      const std::string name = fmt::format("layers.{}.slope", head.layer);
      for (auto& [saved, tensor] : optimiser_.tensors()) {
        if (saved == "parameter." + name) tensor[head.kv_head].fill_(config_.scorer.lookup_slope);
        if (saved == "first_moment." + name) tensor[head.kv_head].zero_();
      }
    }
    try {
      step_ = checkpoint.state.at("step").get<int64_t>();
      tokens_ = checkpoint.state.at("tokens").get<int64_t>();
      skipped_ = checkpoint.state.at("skipped").get<int64_t>();
      optimiser_.set_num_applied(checkpoint.state.at("applied").get<int64_t>());
      train_->seek(checkpoint.state.at("data").get<std::string>());
      // What a run that is finished already says of itself. A checkpoint of an earlier program has neither.
      if (const auto loss = checkpoint.state.find("loss"); loss != checkpoint.state.end() && loss->is_number()) {
        last_loss_ = loss->get<double>();
      }
      if (const auto found = checkpoint.state.find("validation");
          found != checkpoint.state.end() && found->at(0).is_number()) {
        last_validation_ = Evaluation{found->at(0).get<double>(), found->at(1).get<double>()};
      }
      if (config_.recurrent.chunk > 0) {
        carried_.load("carried", checkpoint, config_.data.batch);
        if (teacher_carried_) teacher_carried_->load("teacher_carried", checkpoint, config_.data.batch);
      }
      report_changes(checkpoint.state.at("config").get<std::string>());
      report_other_shards("data.train", checkpoint.state.value("data_fingerprint", ""), *train_);
      report_other_shards("data.validation", checkpoint.state.value("validation_fingerprint", ""), *validation_);
    } catch (const nlohmann::json::exception& error) {
      throw_data("{}: expected a state of this program, found another: {}", checkpoint.path, error.what());
    } catch (const std::out_of_range&) {
      throw_data("{}: expected carried tensors of chunks of {}, found others", checkpoint.path,
                 config_.recurrent.chunk);
    }
    was_resumed_ = true;
    observer_.notice(fmt::format("going on after step {}", step_));
  }

  // The same folder may hold other shards by now; the position is a number of rows, whatever they hold.
  void report_other_shards(const char* key, const std::string& saved, const BatchSource& source) const {
    if (saved.empty() || saved == source.fingerprint()) return;
    observer_.notice(
        fmt::format("{} holds other shards than when {} was saved: unless they are of the same documents, rows from "
                    "here on are not those of an uninterrupted run",
                    key, whole_checkpoint_));
  }

  // A run that goes on with another configuration is allowed, and said.
  void report_changes(const std::string& saved_text) {
    TrainConfig now = config_, saved = parse_config(saved_text, "checkpoint", {});
    const auto text = [](const ConfigKey& key) {
      return std::visit([](const auto* value) { return fmt::format("{}", *value); }, key.field);
    };
    const std::vector<ConfigKey> new_keys = keys(now), old_keys = keys(saved);
    for (size_t i = 0; i < new_keys.size(); ++i) {
      if (const std::string before = text(old_keys[i]), after = text(new_keys[i]); before != after) {
        observer_.notice(fmt::format("{} was {}, now {}", new_keys[i].name, in_quotes(before), in_quotes(after)));
      }
    }
  }

  TrainResult stopped() const {
    return {.is_complete = false,
            .steps = step_,
            .skipped_steps = skipped_,
            .tokens = tokens_,
            .loss = last_loss_,
            .validation = last_validation_,
            .exported = {}};
  }

  // A line for the model's card. A base whose tokenizer cannot be read is no reason to lose what was trained.
  std::string tokenizer_into(const std::string& folder) const {
    if (config_.model.base.empty()) return "none, as there is no base: put the tokenizer.json of the shards here";
    try {
      export_tokenizer(config_.model.base, folder);
      return "the base's";
    } catch (const WriteError&) {
      throw;
    } catch (const DataError& error) {
      return fmt::format("none: {}", error.what());
    }
  }

  std::string export_all() const {
    const std::string folder = config_.run.folder + "/model";
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    if (error) throw WriteError(fmt::format("{}: cannot create it: {}", folder, error.message()));
    std::string tokenizer;
    if (exports_model()) {
      export_huggingface(session_.network, folder);
      tokenizer = tokenizer_into(folder);
    }
    if (config_.attention.kind == "sparsek") {
      export_adapter(session_.network, config_, folder + "/adapter.safetensors");
    }
    export_card(session_.network, config_,
                {.steps = step_,
                 .tokens = tokens_,
                 .skipped_steps = skipped_,
                 .validation = last_validation_,
                 .tokenizer = tokenizer},
                folder + "/README.md");
    return folder;
  }

  TrainConfig config_;
  const Observer& observer_;
  Session session_;
  std::unique_ptr<BatchSource> train_, validation_;
  std::vector<HeadIndex> lookup_heads_;  // whose slopes are held
  std::string validation_begin_;
  Optimiser optimiser_;
  CheckpointFolder folder_;
  Carried carried_;
  std::optional<Carried> teacher_carried_;
  std::optional<MetricsFile> metrics_;

  int64_t step_ = 0, tokens_ = 0, skipped_ = 0;
  bool was_applied_ = false, was_resumed_ = false;
  std::string whole_checkpoint_;  // that this run loaded or saved last
  double last_loss_ = 0, tokens_per_second_ = 0, seconds_per_step_ = 0;
  std::optional<Evaluation> last_validation_;
  std::optional<FolderLock> lock_;
};

}  // namespace

TrainResult train(const TrainConfig& config, const Resume& resume, const Observer& observer) {
  if (config.run.threads > 0) at::set_num_threads(static_cast<int>(config.run.threads));
  if (config.attention.deterministic) at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  Run run(config, observer);
  return run(resume);
}

}  // namespace sparsek::train
