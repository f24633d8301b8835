// What the CUDA kernels that merge share: neighbouring elements of a thread, and what differences subtract.
#pragma once

#include <cuda_runtime.h>

#include "cuda_memory.h"
#include "dtypes.h"
#include "merge_rule.h"

namespace negmerge {
namespace {

// E neighbouring elements of one type. Those of 16 bits lie in pairs in words of 32, as they are loaded and stored.
template <class M, int E>
struct Elements {
  static constexpr int kInWord = sizeof(typename M::Word) / sizeof(typename M::Bits);
  typename M::Word words[E / kInWord];
};

template <class T, class M, int E>
__device__ T widen(const Elements<M, E>& elements, int e) {
  if constexpr (elements.kInWord == 1) return widen<T, M>(elements.words[e]);
  else return widen<T, M>(e % 2 ? elements.words[e / 2] >> 16 : elements.words[e / 2] & 0xffffu);
}

// Rounds neighbours to storage.
template <class S, int E>
__device__ Elements<S, E> rounded(const typename S::Float (&numbers)[E]) {
  using Word = typename S::Word;
  Elements<S, E> elements;
#pragma unroll
  for (int e = 0; e < E; e += elements.kInWord) {
    if constexpr (elements.kInWord == 1) elements.words[e] = S::template round<Word>(numbers[e]);
    else elements.words[e / 2] = round_pair<S>(numbers[e], numbers[e + 1]);
  }
  return elements;
}

// What d_k of models of type M subtracts: the base, rounded where M does not hold every value of the base's type.
template <class T, class S, class M>
__device__ T origin(T base) {
  if constexpr (kHolds<M, S>) return base;
  else return static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(base)));
}

}  // namespace
}  // namespace negmerge
