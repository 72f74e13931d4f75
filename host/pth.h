// A PyTorch checkpoint: what torch.save(model.state_dict(), path) writes and torch.load(path, weights_only=True) opens.
// defines: write_pth
#pragma once
#include <string>
#include <vector>

#include "safetensors.h"

// Writes a state dict of F32 tensors in the order given. Views of the same data share one storage in the file, as they
// do in torch. Equal input gives equal bytes.
void write_pth(const std::string& path, const std::vector<TensorView>& tensors);
