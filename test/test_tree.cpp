// The order in which the gradients of a step's batches are added: host/tree.h.
#include "../host/tree.h"

#include <string>
#include <vector>

#include "test.h"

namespace {

// The sum as a formula, and the highest buffer that it took.
struct Formula {
  std::string text;
  int highest = 0;
};

Formula formula(int first, int count) {
  std::vector<std::string> buffers(33);
  Formula out;
  sum_tree(
      first, count, 0,
      [&](int number, int level) {
        buffers[size_t(level)] = std::to_string(number);
        out.highest = std::max(out.highest, level);
      },
      [&](int level) {
        std::string& sum = buffers[size_t(level)];
        sum = "(" + sum + "+" + buffers[size_t(level) + 1] + ")";
      });
  out.text = buffers[0];
  return out;
}

}  // namespace

TEST_CASE("What two parts have in common, and where nothing begins", "[tree]") {
  const auto is = [](const Part& a, const Part& b) { return a.first == b.first && a.count == b.count; };
  CHECK(is(common({2, 5}, {4, 10}), {4, 3}));
  CHECK(is(common({4, 10}, {2, 5}), {4, 3}));
  CHECK(is(common({0, 20}, {3, 4}), {3, 4}));
  CHECK(is(common({0, 3}, {3, 4}), {3, 0}));
  CHECK(is(common({9, 1}, {3, 4}), {3, 0}));
  CHECK(is(common({5, 0}, {3, 4}), {3, 0}));
}

TEST_CASE("Gradients are added as a tree of halves") {
  CHECK(formula(0, 1).text == "0");
  CHECK(formula(0, 2).text == "(0+1)");
  CHECK(formula(0, 5).text == "(((0+1)+2)+(3+4))");
  CHECK(formula(3, 8).text == "(((3+4)+(5+6))+((7+8)+(9+10)))");
}

TEST_CASE("The sum of a step is the sum of its two halves, and needs as many more buffers as tree_levels says") {
  for (int count = 2; count <= 70; count++) {
    const int left = left_part(count);
    CHECK(formula(0, count).text == "(" + formula(0, left).text + "+" + formula(left, count - left).text + ")");
    CHECK(formula(0, count).highest == tree_levels(count));
  }
  CHECK(tree_levels(1) == 0);
  CHECK(tree_levels(2'000'000'000) == 30);
}

TEST_CASE("Each rank has a branch of the tree, and the branches make the sum of one process") {
  for (int batches = 1; batches <= 40; batches++)
    for (int ranks = 1; ranks <= batches; ranks++) {
      std::vector<std::string> pieces;
      size_t next = 0;
      for (int r = 0; r < ranks; r++) {
        const Part part = tree_part(r, ranks, batches);
        REQUIRE(part.first == next);
        REQUIRE(part.count > 0);
        next += part.count;
        pieces.push_back(formula(int(part.first), int(part.count)).text);
        if ((ranks & (ranks - 1)) == 0 && batches % ranks == 0) REQUIRE(part.count == size_t(batches / ranks));
      }
      REQUIRE(next == size_t(batches));
      sum_pieces(pieces.data(), ranks, [](std::string& sum, const std::string& x) { sum = "(" + sum + "+" + x + ")"; });
      REQUIRE(pieces[0] == formula(0, batches).text);
    }
}
