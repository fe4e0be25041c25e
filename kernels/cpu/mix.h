// A weighted sum of divergences, computed in the same sweeps. It stands beside the functors of divergences.h, whose
// objects are its parts. Each part is centred by itself, so its gradient keeps the precision that it has alone. The value
// of rows that nearly agree does not, where forward KL is a part: alone it is summed by sweep 1, which cancels less.
//
// Its name is "+" and the name of each part ("+forward_kl+tvd"); its numbers are a weight and kParameters for each.
#pragma once
#include "api.h"
#include "divergences.h"

#include <variant>

namespace FASTKD_ISA {

struct Mix {
#define FASTKD_PART(name, Divergence) , Divergence
  using Functor = std::variant<std::monostate FASTKD_FUNCTORS(FASTKD_PART)>;
#undef FASTKD_PART
  struct Part {
    Functor functor;
    float weight;
  };
  SymmetricKL kl{0, 0};  // what the parts of the Kullback-Leibler family add up to
  Part parts[kMostParts];  // the others
  int count = 0;
  bool known = false;  // else one of the names is unknown, or there are more numbers or fewer

  static bool names(const char* divergence) { return divergence[0] == '+'; }

  Mix(const char* divergence, const double* parameters, int64_t parameter_count) {
    for (const char* at = divergence; *at == '+'; parameters += 1 + kParameters) {
      const size_t length = strcspn(++at, "+");
      char name[32];
      parameter_count -= 1 + kParameters;
      if (length >= sizeof name || parameter_count < 0) return;
      memcpy(name, at, length), name[length] = 0, at += length;
      if (!with_divergence(name, false, [&](auto kind) { return add(kind, parameters[0], parameters + 1); })) return;
    }
    known = parameter_count == 0;
  }

  bool kl_alone() const { return count == 0; }
  bool has_kl() const { return kl.forward_weight() != 0 || kl.reverse_weight() != 0; }

 private:
  template <class Divergence>
  bool add(Kind<Divergence>, double weight, const double* parameters) {
    if constexpr (CrossSums<Divergence>::forward || CrossSums<Divergence>::reverse) {
      const Divergence part(parameters);
      kl.forward_kl.weight += weight * part.forward_weight(), kl.reverse_kl.weight += weight * part.reverse_weight();
      return true;
    } else if constexpr (!std::is_same<Divergence, MSE>::value) {
      if (count == kMostParts) return false;
      parts[count++] = {Divergence(parameters), (float)weight};
      return true;
    }
    return false;
  }
};

// A part of a mix on a row: a functor whose result has the weight, and to which that of the Kullback-Leibler family may
// be added, since it costs little where the cell is known.
template <class Divergence, bool with_kl>
struct WeightedPart {
  Centred<Divergence> part;
  float weight;
  Centred<SymmetricKL> kl;

  Pair operator()(const Cell& c) const {
    const Pair own = part(c);
    if constexpr (!with_kl) return {weight * own.term, weight * own.g};
    const Pair beside = kl(c);
    return {weight * own.term + beside.term, weight * own.g + beside.g};
  }
};

template <>
struct Centred<Mix> {
#define FASTKD_PART(name, Divergence) , Centred<Divergence>
  std::variant<std::monostate FASTKD_FUNCTORS(FASTKD_PART)> parts[kMostParts];
#undef FASTKD_PART
  const Mix& mix;
  Centred<SymmetricKL> kl;

  Centred(const Mix& mix, const Cell& top) : mix(mix), kl(mix.kl, top) {
    for (int i = 0; i < mix.count; i++)
      std::visit([&](const auto& part) {
        using Divergence = std::decay_t<decltype(part)>;
        if constexpr (!std::is_same<Divergence, std::monostate>::value)
          parts[i].template emplace<Centred<Divergence>>(part, top);
      }, mix.parts[i].functor);
  }

  // Calls function(functor) for each part that is a functor. The first has the Kullback-Leibler family's beside it.
  template <class Function>
  void each(const Function& function) const {
    for (int i = 0; i < mix.count; i++)
      std::visit([&](const auto& part) { visit(part, i, function); }, parts[i]);
  }

  Pair operator()(const Cell& c) const {
    if (mix.kl_alone()) return kl(c);
    Pair total{};
    each([&](const auto& part) {
      const Pair pair = part(c);
      total = {total.term + pair.term, total.g + pair.g};
    });
    return total;
  }

 private:
  template <class Function>
  void visit(std::monostate, int, const Function&) const {}
  template <class Divergence, class Function>
  void visit(const Centred<Divergence>& part, int i, const Function& function) const {
    if (i == 0 && mix.has_kl()) function(WeightedPart<Divergence, true>{part, mix.parts[i].weight, kl});
    else function(WeightedPart<Divergence, false>{part, mix.parts[i].weight, kl});
  }
};

}  // namespace FASTKD_ISA
