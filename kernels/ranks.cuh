// The cards of a run's ranks (host/ranks.h) exchange gradients and parameters, as work on a stream. What they exchange, and
// the order in which it is added up, are the same as between CPUs. NCCL carries it (link.h).
// defines: DeviceRanks
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../host/ranks.h"
#include "../host/tensors.h"
#include "../host/tree.h"
#include "add.cuh"
#include "link.h"
#include "runtime.cuh"

// Which part of the parameters this rank updates, and how it gets their gradients. With one rank it is all of them, and
// nothing is exchanged.
//
// Gradients travel in buckets: one with the matrices of each layer, from the last layer to the first, and one with what is
// left. A rank that has a single batch of a step sends a layer's bucket as soon as backward has written it, on a stream
// of its own, while the layers below are computed. A rank with several batches sends all of them after the last. That
// is the same work in the same order, so ranks of both kinds fit together, and the sum has the same bits.
class DeviceRanks {
 public:
  // The buffers have the layout's elements, and the ranks share them in whole multiples of `unit`.
  DeviceRanks(const Layout& layout, size_t unit, bool training)
      : shares_(even_parts(training ? layout.size() : 0, unit, ranks().count())),
        units_(even_parts(training ? ceil_div(layout.size(), unit) : 0, 1, ranks().count())),
        several_(training && ranks().count() > 1) {
    if (!several_) return;
    received_ = DeviceBuffer<float>(own().count * size_t(ranks().count()), "gradients from other processes");
    losses_ = DeviceBuffer<double>(size_t(ranks().count()), "losses");
    link_ = std::make_unique<DeviceLink>();
    beside_ = std::make_unique<Stream>();
    fill_buckets(layout);
  }
  bool several() const { return several_; }
  const Part& own() const { return shares_[size_t(ranks().rank())]; }
  const Part& own_units() const { return units_[size_t(ranks().rank())]; }
  const std::vector<Part>& shares() const { return shares_; }
  const std::vector<Part>& units() const { return units_; }

  // Call this before a step; `batches` counts the batches of all ranks. Returns the ones that this rank computes.
  Part begin_step(int batches) {
    const Part own = tree_part(ranks().rank(), ranks().count(), batches);
    early_ = several_ && own.count == 1;
    return own;
  }
  bool early() const { return early_; }  // whether each layer's gradients may leave as soon as they are written
  // Layer l's bucket leaves, from grads (count), where it is whole when `written` has been passed.
  void leave(int l, float* grads, const Event& written) {
    if (layers_.empty()) return;  // a model of one layer
    written.hold(*beside_);
    exchange(layers_[size_t(l)], grads, nullptr);
  }

  // grads (count), of which this rank's share becomes the sum over the ranks; loss (1) becomes the sum, too.
  void sum(float* grads, double* loss, cudaStream_t stream) {
    if (!several_) return;
    written_.record(stream);
    written_.hold(*beside_);
    for (size_t l = early_ ? 0 : layers_.size(); l-- > 0;) exchange(layers_[l], grads, nullptr);
    early_ = false;
    exchange(others_, grads, loss);
    exchanged_.record(*beside_);
    exchanged_.hold(stream);

    std::vector<Piece> pieces;
    for (int r = 0; r < ranks().count(); r++) pieces.push_back(piece(r, grads, loss));
    sum_pieces(pieces.data(), ranks().count(), [&](const Piece& total, const Piece& x) {
      add(total.grads, x.grads, own().count, total.loss, x.loss, stream);
    });
    if (ranks().first()) return;
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
  using Bucket = std::vector<Part>;  // of the flat gradients, in order

  void fill_buckets(const Layout& layout) {
    for (const TensorSpec& spec : layout.tensors()) {
      if (spec.layers < 2 || spec.shape.size() < 2) continue;
      layers_.resize(size_t(spec.layers));
      for (size_t l = 0; l < layers_.size(); l++) layers_[l].push_back({spec.offset + l * spec.stride, spec.stride});
    }
    Bucket matrices;
    for (const Bucket& layer : layers_) matrices.insert(matrices.end(), layer.begin(), layer.end());
    std::sort(matrices.begin(), matrices.end(), [](const Part& a, const Part& b) { return a.first < b.first; });
    matrices.push_back({layout.size(), 0});
    size_t end = 0;
    for (const Part& part : matrices) {
      if (part.first > end) others_.push_back({end, part.first - end});
      end = part.first + part.count;
    }
  }

  // What rank r computed of this rank's share.
  struct Piece {
    float* grads;
    double* loss;
  };
  Piece piece(int r, float* grads, double* loss) {
    if (r == ranks().rank()) return {grads + own().first, loss};
    return {received_.data() + size_t(r) * own().count, losses_.data() + r};
  }

  static Bucket shared(const Bucket& bucket, const Part& share) {
    Bucket out;
    for (const Part& part : bucket)
      if (const Part both = common(part, share); both.count > 0) out.push_back(both);
    return out;
  }

  // Every rank sends each other what the bucket has of its share; with it goes the loss, unless that is nullptr.
  void exchange(const Bucket& bucket, float* grads, double* loss) {
    std::vector<DeviceMessage> out, in;
    for (int r = 0; r < ranks().count(); r++) {
      if (r == ranks().rank()) continue;
      const Piece received = piece(r, grads, loss);
      for (const Part& part : shared(bucket, shares_[size_t(r)]))
        out.push_back({r, grads + part.first, part.count * sizeof(float)});
      for (const Part& part : shared(bucket, own()))
        in.push_back({r, received.grads + (part.first - own().first), part.count * sizeof(float)});
      if (!loss) continue;
      out.push_back({r, loss, sizeof *loss});
      in.push_back({r, received.loss, sizeof *loss});
    }
    link_->exchange(out, in, *beside_);
  }

  std::vector<Part> shares_, units_;  // by rank
  bool several_, early_ = false;
  std::vector<Bucket> layers_;  // by layer
  Bucket others_;
  DeviceBuffer<float> received_;  // (ranks, own().count)
  DeviceBuffer<double> losses_;   // (ranks)
  std::unique_ptr<DeviceLink> link_;
  std::unique_ptr<Stream> beside_;  // where gradients travel
  Event written_, exchanged_;
};
