// The rungs by name, in the order in which they are climbed: each takes its command line, trains, and leaves its result
// in out/ladder/<name>/.
#pragma once
#include "rung.h"

void gradient_descent_rung(const ladder::Arguments& arguments);  // 0_gradient_descent.cpp
void counted_rung(const ladder::Arguments& arguments);           // 1_counted.cpp
void bigram_rung(const ladder::Arguments& arguments);            // 2_bigram.cpp
void mlp_rung(const ladder::Arguments& arguments);               // 3_mlp.cpp
void tree_rung(const ladder::Arguments& arguments);              // the same
void wavenet_rung(const ladder::Arguments& arguments);           // 4_wavenet.cpp
void residual_rung(const ladder::Arguments& arguments);          // 5_residual.cpp
void transformer_rung(const ladder::Arguments& arguments);       // 6_transformer.cpp
