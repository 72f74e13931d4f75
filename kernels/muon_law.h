// What Muon computes, on the CPU (muon.h) and on the GPU (muon.cuh): the numbers that both have in common.
// defines: muon_beta, muon_rounds, muon_a, muon_b, muon_c, muon_size
#pragma once

constexpr double muon_beta = 0.95;  // decay of the running mean of the gradient

// A round makes a matrix's singular values s into a s + b s^3 + c s^5. Five rounds bring all between 0.01 and 1 to between
// 0.68 and 1.14: Muon needs no more, and with these numbers small values grow fastest.
constexpr int muon_rounds = 5;
constexpr double muon_a = 3.4445, muon_b = -4.7750, muon_c = 2.0315;

// An orthogonal matrix has elements of about 1 / sqrt(its longer side). An update multiplies them by sqrt(longer side), by
// this number and by the learning rate: they then have the usual size of AdamW's.
constexpr double muon_size = 0.2;
