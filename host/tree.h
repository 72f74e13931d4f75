// The order in which a step adds up the gradients of its batches. It is a binary tree: the sum of `count` batches is the
// sum of the first half of them plus the sum of the second half, and so on down to single batches. Whoever computes a
// half gets the same bits, so the sum does not depend on how many processes share the work.
// defines: Part, common, left_part, tree_levels, sum_tree, tree_part, sum_pieces
#pragma once
#include <cstddef>

struct Part {
  size_t first, count;
};

// What both have. If that is nothing, it begins where b does.
constexpr Part common(const Part& a, const Part& b) {
  const size_t first = a.first > b.first ? a.first : b.first, a_end = a.first + a.count, b_end = b.first + b.count;
  const size_t end = a_end < b_end ? a_end : b_end;
  return first < end ? Part{first, end - first} : Part{b.first, 0};
}

// How many of `count` batches belong to the first half, which is the larger one where the halves are not equal.
constexpr int left_part(int count) { return (count + 1) / 2; }

// How many buffers the sum of `count` batches takes besides the one for the result: 0 for one batch, 1 for two or three, 2
// for four to seven. A first half is done before its second half is begun in the next buffer.
constexpr int tree_levels(int count) { return count > 1 ? 1 + tree_levels(count / 2) : 0; }

// Leaves in the buffer `level` the sum of the batches first ... first + count - 1. one(number, level) computes a batch
// into a buffer, and add(level) adds the buffer level + 1 to the buffer level.
template <class One, class Add>
void sum_tree(int first, int count, int level, const One& one, const Add& add) {
  if (count == 1) return one(first, level);
  sum_tree(first, left_part(count), level, one, add);
  sum_tree(first + left_part(count), count - left_part(count), level + 1, one, add);
  add(level);
}

// The batches of a step that one of several processes, called ranks, computes. The ranks are divided like the batches,
// half to half, so each has a whole branch of the tree. There are at least as many batches as ranks. All ranks have equally
// many batches if the number of ranks is a power of two and divides the number of batches.
inline Part tree_part(int rank, int ranks, int batches, int first = 0) {
  if (ranks == 1) return {size_t(first), size_t(batches)};
  const int left_ranks = left_part(ranks), left = left_part(batches);
  if (rank < left_ranks) return tree_part(rank, left_ranks, left, first);
  return tree_part(rank - left_ranks, ranks - left_ranks, batches - left, first + left);
}

// Adds up what the ranks have computed, in the tree's order: pieces[0] = the sum of pieces[0] ... pieces[ranks - 1], each
// of which has room for sums on the way. add_to(sum, x) adds a piece to another.
template <class Piece, class AddTo>
void sum_pieces(Piece* pieces, int ranks, const AddTo& add_to) {
  if (ranks == 1) return;
  const int left = left_part(ranks);
  sum_pieces(pieces, left, add_to);
  sum_pieces(pieces + left, ranks - left, add_to);
  add_to(pieces[0], pieces[left]);
}
