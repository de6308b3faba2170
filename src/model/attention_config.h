// Which attention a model runs with. AttentionRequest is what a user asked for, field by field; resolve() fills in the
// defaults of the kind and of the adapter, checks everything and gives the AttentionConfig that the model is built
// from.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/params.h"

namespace sparsek::model {

enum class AttentionKind : uint8_t { kDense, kWindow, kSparsek };
enum class ScorerKind : uint8_t { kWindowMass, kKeyNorm, kAdapter };

const char* name(AttentionKind kind);  // "dense", "window", "sparsek"
const char* name(Gate gate);           // "soft", "hard"

// The inverse of the names above; throws UsageError naming the field ("attention", "gate").
AttentionKind parse_attention_kind(const std::string& text);
Gate parse_gate(const std::string& text);

// Position slopes of the untrained scorers: what eq. 1 adds to a score per 1,024 positions.
inline constexpr double kWindowMassSlope = 2;
inline constexpr double kKeyNormSlope = 0;

// Unset fields take defaults: sparsek 124/896/4, window 1020/4, or the adapter's own numbers.
struct AttentionRequest {
  AttentionKind kind = AttentionKind::kSparsek;
  std::optional<int64_t> topk = {};         // sparsek only
  std::optional<int64_t> window_size = {};  // counts the query's own key
  std::optional<int64_t> num_sinks = {};
  std::optional<Gate> gate = {};             // sparsek only; hard for the untrained scorers
  std::optional<int64_t> far_distance = {};  // 0: off (true positions); default sinks + topk + window
  std::string scorer = "window_mass";        // window_mass, key_norm, or the path of an adapter
  std::optional<double> slope = {};          // untrained scorers only: an adapter has its own
};

// Of each kind of visible key: far above use, far below int32.
inline constexpr int64_t kMaxKeys = int64_t{1} << 20;

// How much one layer keeps.
struct LayerBudget {
  int64_t topk = 0, window_size = 0;
  bool operator==(const LayerBudget&) const = default;
};

// "252+256, 508+512": topk and window of one layer after the other. The inverse throws UsageError naming `field` unless
// each is a number of 1 to 2^20.
std::string budgets_text(const std::vector<LayerBudget>& layers);
std::vector<LayerBudget> parse_budgets(const char* field, const std::string& text);
// Rounded to the nearest; of at least one layer.
LayerBudget mean_budget(const std::vector<LayerBudget>& layers);
int64_t largest_window(const std::vector<LayerBudget>& layers);

struct AttentionConfig {
  AttentionKind kind = AttentionKind::kSparsek;
  int64_t topk = 0;                      // 0 unless sparsek; the layers' mean where they differ, as the next
  int64_t window_size = 0;               // 0: dense
  std::vector<LayerBudget> layers = {};  // sparsek only; empty: topk and window_size in all of them
  int64_t num_sinks = 0;
  int64_t far_distance = 0;  // 0: far keys keep their true positions
  Gate gate = Gate::kHard;
  ScorerKind scorer = ScorerKind::kWindowMass;
  double slope = kWindowMassSlope;  // eq. 1, per 1,024 positions; unused by an adapter, which has one a head
  bool delayed_scores = true;       // the scorer reads y of eq. 1b; of an adapter once its metadata were given
  std::string adapter_path = {};    // of ScorerKind::kAdapter

  bool has_far_rotary() const { return far_distance > 0; }
  // Of any layer.
  int64_t largest_window() const;
  // Sinks, selected keys and the window of a layer (of their means), and no less than the sinks and the largest window:
  // the rotary distance at which far keys stay beyond a window's.
  int64_t default_far_distance() const;
  // What `layer` runs with: its own topk and window_size.
  AttentionConfig of_layer(int64_t layer) const;
};

// What an adapter proposes; null members are not proposed.
struct AttentionDefaults {
  std::optional<int64_t> topk = {}, window_size = {}, num_sinks = {}, far_distance = {};
  // Of every layer of its model, or empty. A requested topk or window_size replaces every layer's own.
  std::vector<LayerBudget> layers = {};
  std::optional<Gate> gate = {};
  bool delayed_scores = false;  // a fact, not a proposal: some layer's alpha is not 0
};

// Throws UsageError naming the field when a value is out of range or does not apply to the kind. `adapter` is null
// without one; where the request overrides it, a line is appended to `notices`.
AttentionConfig resolve(const AttentionRequest& request, const AttentionDefaults* adapter,
                        std::vector<std::string>* notices);

// One line for people and logs, e.g. "sparsek topk 124 window 896 sinks 4 gate hard scorer window_mass slope 2
// far-distance 1024".
std::string describe(const AttentionConfig& config);

}  // namespace sparsek::model
