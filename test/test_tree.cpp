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

TEST_CASE("Gradients are added as a tree of halves") {
  CHECK(formula(0, 1).text == "0");
  CHECK(formula(0, 2).text == "(0+1)");
  CHECK(formula(0, 5).text == "(((0+1)+2)+(3+4))");
  CHECK(formula(3, 8).text == "(((3+4)+(5+6))+((7+8)+(9+10)))");
}

TEST_CASE("A sum of gradients is that of its two halves, which takes as many buffers as the tree has levels") {
  for (int count = 2; count <= 70; count++) {
    const int left = left_part(count);
    CHECK(formula(0, count).text == "(" + formula(0, left).text + "+" + formula(left, count - left).text + ")");
    CHECK(formula(0, count).highest == tree_levels(count));
  }
  CHECK(tree_levels(1) == 0);
  CHECK(tree_levels(2'000'000'000) == 30);
}
