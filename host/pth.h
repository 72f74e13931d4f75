// PyTorch's files: what torch.save(model.state_dict(), path) writes and torch.load(path, weights_only=True) opens.
// defines: write_pth, PthFile
#pragma once
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"
#include "pickle.h"
#include "safetensors.h"

// Writes a state dict of F32 tensors in the order given. Views of the same data share one storage in the file, as they
// do in torch. Equal input gives equal bytes.
void write_pth(const std::string& path, const std::vector<TensorView>& tensors);

// A file that torch.save has written, in today's format or in the one before PyTorch 1.6. It holds a state dict, or a
// dictionary that has a state dict among its values, such as {"model": state_dict, "optimizer": ...}. Nothing in the file
// is executed, and we check what it says of itself before we believe it.
class PthFile {
 public:
  explicit PthFile(const std::string& path);
  // All tensors that have a name. Those of a dictionary in the dictionary are called <its key>.<name>.
  const std::vector<TensorView>& tensors() const { return tensors_; }
  static bool looks_like_one(std::string_view bytes);  // by a file's first bytes

 private:
  struct Storage;
  void read_zip();
  void read_legacy();
  void add_tensors(const Pickled& dict, const std::string& prefix);
  TensorView tensor(const std::string& name, const Pickled& call);
  Storage storage(const Pickled& outside) const;
  std::string_view bytes_of(const Storage& storage);

  std::string path_;
  MappedFile file_;
  Unpickler unpickler_;
  struct zip* zip_ = nullptr;                                 // only while the constructor reads
  std::string folder_;                                        // in the archive
  std::map<std::string, std::string, std::less<>> unzipped_;  // storages by key
  std::map<std::string, std::string_view, std::less<>> legacy_;
  std::vector<TensorView> tensors_;
  size_t entries_ = 0;
};
