// Blocks in which student and teacher nearly agree, for the divergences with q - p in their gradient. A student near
// its teacher learns from the small difference e_s - e_t. Subtracting the two rounded exponentials would leave mostly
// rounding error, so the difference is computed from the exponents' difference, and stashed in place of e_s.
#pragma once
#include "row.h"

namespace FASTKD_ISA {

// A vector of columns is near if no student's exponent in it is further than 1/2 from the teacher's.
struct Nearness {
  LogRatio apart;
  Nearness(const RowSpec& spec, float student_max, float teacher_max)
      : apart(spec, student_max, teacher_max, 0) {}

  // y_s - y_t, and 0 where both are -inf.
  vec difference(vec zs, vec zt) const { return keep(~((zs == -kInf) & (zt == -kInf)), apart(zs, zt)); }
  static bool holds(vec difference) { return !any(~(abs(difference) <= 0.5f)); }
  bool holds(vec zs, vec zt) const { return holds(difference(zs, zt)); }
};

// The memory of a block: logits and stashes. `near` has a flag per vector: set where the stash holds e_s - e_t in place
// of e_s. nullptr: nobody reads the flags.
struct NearBlock {
  const float *s, *t;
  float *es, *et, *eh;
  uint8_t* near;
  int64_t n;
};

// Sweep 1 of one block with near vectors; `statistics` handles all other blocks. Returns the number of near vectors.
// Arguments come by value, so that the compiler knows that no store changes them. Not inlined: the sweep over other
// blocks has no registers to spare.
template <bool reverse, int hard>
__attribute__((noinline)) int64_t near_statistics(const NearBlock at, const Prefetch next_student,
                                                  const Prefetch next_teacher, const Nearness nearness,
                                                  const RowSpec& spec, Sums& sums) {
  const float cs = spec.student_scale, ct = spec.teacher_scale;
  const float student_max = sums.student_max, teacher_max = sums.teacher_max;
  int64_t count = 0;
  vec sum_s{}, sum_t{}, sum_h{}, sum_gap{}, sum_forward{}, sum_reverse{};
  for (int64_t i = 0; i < at.n; i += lanes) {
    next_student(i), next_teacher(i);
    const vec s = load(at.s + i), t = load(at.t + i);
    const vec zs = s - student_max, yt = (t - teacher_max) * ct, et = exp2_nonpositive(yt);
    const vec apart = nearness.difference(s, t);
    const bool near = Nearness::holds(apart);
    vec es, gap, difference;
    if (near) {
      difference = apart, gap = et * (apart * expm1_poly(apart)), es = et + gap;
      store(at.es + i, gap);
    } else {
      const vec ys = zs * cs;
      es = exp2_nonpositive(ys), difference = ys - yt, gap = es - et;
      store(at.es + i, es);
    }
    store(at.et + i, et);
    if (at.near) at.near[i / lanes] = near;
    count += near;
    sum_s += es, sum_t += et, sum_gap += gap;
    sum_forward += keep(et != 0.f, et * -difference);
    if constexpr (reverse) sum_reverse += keep(es != 0.f, es * difference);
    if constexpr (hard == kOwnExponential) {
      const vec eh = exp2_nonpositive(zs * kLog2e);
      store(at.eh + i, eh);
      sum_h += eh;
    } else if constexpr (hard > kPower1) {
      sum_h += power<hard>(es);
    }
  }
  sums.student += sum(sum_s), sums.teacher += sum(sum_t), sums.gap += sum(sum_gap);
  sums.hard += sum(sum_h), sums.forward += sum(sum_forward), sums.reverse += sum(sum_reverse);
  return count;
}

// a - b, where q = a e_s and p = b e_t for the exponentials of a block. Computed from the sums' gap.
inline double near_gap(float student_max, float teacher_max, const RowSpec& spec, const Sums& sums) {
  const double moved_s = rescale(student_max, sums.student_max, spec.student_scale);
  const double moved_t = rescale(teacher_max, sums.teacher_max, spec.teacher_scale);
  return ((moved_s - moved_t) * sums.teacher - moved_t * sums.gap) / (sums.student * sums.teacher);
}

// The factors of the gradient: in near vectors `near_student` of e_s, `near_gap` of e_s - e_t and `near_teacher` of
// e_t, in others `student` of e_s and `teacher` of e_t. `ratio` and `hard` apply to both.
struct NearGradient {
  float student, teacher, near_student, near_gap, near_teacher, ratio, hard;
};

// Sweep 3 of one block with near vectors.
template <bool with_ratio, int hard>
__attribute__((noinline)) void near_gradient(const NearBlock at, const LogRatio log_ratio, const NearGradient by,
                                             float* out) {
  for (int64_t i = 0; i < at.n; i += lanes) {
    const bool near = at.near[i / lanes];
    const vec et = load(at.et + i), stashed = load(at.es + i), es = near ? et + stashed : stashed;
    vec g = near ? stashed * by.near_gap + et * by.near_teacher : et * by.teacher;
    const float student = near ? by.near_student : by.student;
    if constexpr (with_ratio) {
      const vec ratio = log_ratio(load(at.s + i), load(at.t + i));
      g += keep(es != 0.f, es * (student + by.ratio * ratio));
    } else {
      g += es * student;
    }
    if constexpr (hard == kOwnExponential) g += load(at.eh + i) * by.hard;
    else if constexpr (hard != kNoHard) g += power<hard>(es) * by.hard;
    store(out + i, g);
  }
}

}  // namespace FASTKD_ISA
