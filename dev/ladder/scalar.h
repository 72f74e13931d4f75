// All of reverse-mode differentiation, for scalars: every number remembers which numbers it was computed from, and its
// slope with respect to each; backward goes through the graph from the result to the beginnings and applies the chain
// rule, d result / d input += d result / d output * slope. Baydin et al., "Automatic Differentiation in Machine
// Learning: a Survey", JMLR 2018, section 3.2; Karpathy's micrograd.
//
//   Scalar a = 2, b = 3, c = a * b + tanh(a);
//   c.backward();  // a.grad() is 3 + 1 - tanh(2)^2
//
// defines: Scalar, tanh, relu, exp, log, pow
#pragma once
#include <cmath>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

class Scalar {
 public:
  Scalar(double value = 0) : node_(std::make_shared<Node>()) { node_->value = value; }

  double value() const { return node_->value; }
  double grad() const { return node_->grad; }
  // For gradient descent, on a number that was not computed from others.
  void set(double value) { node_->value = value; }
  void zero_grad() { node_->grad = 0; }

  // Adds d this / d x to x.grad() for every x that this was computed from.
  void backward() const {
    std::vector<Node*> order;  // every node behind all that it was computed from
    visit(node_.get(), order);
    for (Node* node : order)
      if (!node->edges.empty()) node->grad = 0;  // of an earlier backward; beginnings add up
    node_->grad = 1;
    for (size_t i = order.size(); i-- > 0;) {
      order[i]->visited = false;
      for (const Edge& edge : order[i]->edges) edge.from->grad += edge.slope * order[i]->grad;
    }
  }

  friend Scalar operator+(const Scalar& a, const Scalar& b) { return {a.value() + b.value(), {{a, 1}, {b, 1}}}; }
  friend Scalar operator*(const Scalar& a, const Scalar& b) {
    return {a.value() * b.value(), {{a, b.value()}, {b, a.value()}}};
  }
  friend Scalar operator-(const Scalar& a, const Scalar& b) { return a + -1.0 * b; }
  friend Scalar operator/(const Scalar& a, const Scalar& b) { return a * pow(b, -1); }
  friend Scalar tanh(const Scalar& a) {
    const double t = std::tanh(a.value());
    return {t, {{a, 1 - t * t}}};
  }
  friend Scalar relu(const Scalar& a) { return {std::fmax(a.value(), 0), {{a, a.value() > 0 ? 1.0 : 0.0}}}; }
  friend Scalar exp(const Scalar& a) {
    const double e = std::exp(a.value());
    return {e, {{a, e}}};
  }
  friend Scalar log(const Scalar& a) { return {std::log(a.value()), {{a, 1 / a.value()}}}; }
  friend Scalar pow(const Scalar& a, double exponent) {
    return {std::pow(a.value(), exponent), {{a, exponent * std::pow(a.value(), exponent - 1)}}};
  }
  Scalar& operator+=(const Scalar& b) { return *this = *this + b; }

 private:
  struct Node;
  struct Edge {
    std::shared_ptr<Node> from;
    double slope;  // d this / d from
    Edge(const Scalar& input, double s) : from(input.node_), slope(s) {}
  };
  struct Node {
    double value = 0, grad = 0;
    bool visited = false;
    std::vector<Edge> edges;
  };

  Scalar(double value, std::initializer_list<Edge> edges) : Scalar(value) { node_->edges = edges; }

  // Depth first. This recursion, and the one that destroys a graph, go as deep as the longest chain of operations:
  // some thousands are fine.
  static void visit(Node* node, std::vector<Node*>& order) {
    if (std::exchange(node->visited, true)) return;
    for (const Edge& edge : node->edges) visit(edge.from.get(), order);
    order.push_back(node);
  }

  std::shared_ptr<Node> node_;
};
