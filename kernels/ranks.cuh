// The cards of a run's ranks (host/ranks.h) exchange gradients and parameters, as work on a stream. What they exchange, and
// the order in which it is added up, are the same as between CPUs. NCCL carries it (link.h).
// defines: DeviceRanks
#pragma once
#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "../host/ranks.h"
#include "../host/tree.h"
#include "add.cuh"
#include "link.h"
#include "runtime.cuh"

// Which part of the parameters this rank updates, and how it gets their gradients. With one rank it is all of them, and
// nothing is exchanged.
class DeviceRanks {
 public:
  // The buffers have `count` elements, and the ranks share them in whole multiples of `unit`. 0: nothing is trained.
  DeviceRanks(size_t count, size_t unit)
      : shares_(even_parts(count, unit, ranks().count())),
        units_(even_parts(ceil_div(count, unit), 1, ranks().count())),
        several_(count > 0 && ranks().count() > 1) {
    if (!several_) return;
    received_ = DeviceBuffer<float>(own().count * size_t(ranks().count()), "gradients from other processes");
    losses_ = DeviceBuffer<double>(size_t(ranks().count()), "losses");
    link_ = std::make_unique<DeviceLink>();
  }
  bool several() const { return several_; }
  const Part& own() const { return shares_[size_t(ranks().rank())]; }
  const Part& own_units() const { return units_[size_t(ranks().rank())]; }
  const std::vector<Part>& shares() const { return shares_; }
  const std::vector<Part>& units() const { return units_; }

  // grads (count), of which this rank's share becomes the sum over the ranks; loss (1) becomes the sum, too.
  void sum(float* grads, double* loss, cudaStream_t stream) {
    if (!several_) return;
    struct Piece {
      float* grads;
      double* loss;
    };
    std::vector<DeviceMessage> out, in;
    std::vector<Piece> pieces;
    const int me = ranks().rank();
    for (int r = 0; r < ranks().count(); r++) {
      pieces.push_back({received_.data() + size_t(r) * own().count, losses_.data() + r});
      if (r == me) {
        pieces.back() = {grads + own().first, loss};
        continue;
      }
      const Part& theirs = shares_[size_t(r)];
      out.push_back({r, grads + theirs.first, theirs.count * sizeof(float)});
      out.push_back({r, loss, sizeof *loss});
      in.push_back({r, pieces.back().grads, own().count * sizeof(float)});
      in.push_back({r, pieces.back().loss, sizeof *loss});
    }
    link_->exchange(out, in, stream);
    sum_pieces(pieces.data(), ranks().count(), [&](const Piece& total, const Piece& x) {
      add(total.grads, x.grads, own().count, total.loss, x.loss, stream);
    });
    if (me == 0) return;
    const auto copy = [&](auto* to, const auto* from, size_t count) {
      CUDA_CHECK(cudaMemcpyAsync(to, from, count * sizeof *to, cudaMemcpyDeviceToDevice, stream));
    };
    copy(grads + own().first, pieces[0].grads, own().count);
    copy(loss, pieces[0].loss, 1);
  }

  // data: each rank has its part, and gets the others'.
  template <class Element>
  void gather(Element* data, const std::vector<Part>& parts, cudaStream_t stream) {
    if (!several_) return;
    std::vector<DeviceMessage> out, in;
    for (int r = 0; r < ranks().count(); r++) {
      if (r == ranks().rank()) continue;
      const Part &mine = parts[size_t(ranks().rank())], &theirs = parts[size_t(r)];
      out.push_back({r, data + mine.first, mine.count * sizeof(Element)});
      in.push_back({r, data + theirs.first, theirs.count * sizeof(Element)});
    }
    link_->exchange(out, in, stream);
  }

  // The work of a step ends here: see DeviceLink.
  void mark(cudaStream_t stream) {
    if (several_) link_->mark(stream);
  }
  // Until the stream has done its work.
  void wait(cudaStream_t stream) {
    if (several_)
      link_->wait(stream);
    else
      CUDA_CHECK(cudaStreamSynchronize(stream));
  }

 private:
  std::vector<Part> shares_, units_;  // by rank
  bool several_;
  DeviceBuffer<float> received_;  // (ranks, own().count)
  DeviceBuffer<double> losses_;   // (ranks)
  std::unique_ptr<DeviceLink> link_;
};
