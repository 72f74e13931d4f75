// The safetensors format: named tensors in one file that any language reads in a few lines.
//   8 bytes          length of the header, little-endian
//   header           JSON: {"name": {"dtype": "F32", "shape": [65, 384], "data_offsets": [0, 99840]}, ...}; the entry
//                    "__metadata__" maps strings to strings. Padded with spaces.
//   data             the tensors, one after the other without gaps; offsets count from here
// Our files carry checksums in the metadata, 16 hexadecimal digits each: "checksum.<name>" of a tensor's bytes, and
// "checksum" of the header as it is stored, padding included, with zeros for these 16 digits themselves.
// defines: TensorView, shape_text, dtype_size, write_safetensors, SafetensorsFile
#pragma once
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"

// A tensor that somebody else owns.
struct TensorView {
  std::string name;
  std::string dtype;  // "F32", "F64", "I64", ...
  std::vector<size_t> shape;
  const void* data = nullptr;
  std::vector<size_t> stride = {};  // in elements, by dimension; empty: row by row, without gaps
  size_t bytes() const;             // fails if the dtype is unknown or the product overflows
};
std::string shape_text(const std::vector<size_t>& shape);  // "(65, 384)"
size_t dtype_size(const std::string& dtype);               // of an element, in bytes; 0: the type is unknown

using Metadata = std::map<std::string, std::string>;

// Equal input gives equal bytes. Wider types come first in the file, so that every tensor is aligned to its own type.
// The metadata's names "checksum" and "checksum.*" are reserved.
void write_safetensors(const std::string& path, const std::vector<TensorView>& tensors, const Metadata& metadata);

// Which parts of a file are compared with their checksums. The tensors take most of the time that it takes to open a
// checkpoint, so a caller who only wants to know what the header says leaves them out.
enum class Verify { header, all };

// A safetensors file, ours or another program's. Everything that the header says is checked before it is believed, and
// the data against the checksums if there are any. The views point into the mapped file and live as long as this
// object; another program may have left them misaligned for their type, so copy them by memcpy.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path, Verify what = Verify::all);
  const Metadata& metadata() const { return metadata_; }               // without the checksums
  const std::vector<TensorView>& tensors() const { return tensors_; }  // in the order of their data
  const TensorView& find(const std::string& name) const;               // fails if it is absent
  const TensorView* maybe(const std::string& name) const;              // nullptr if it is absent

 private:
  void verify_checksums(std::string_view header, Verify what);

  std::string path_;
  MappedFile file_;
  Metadata metadata_;
  std::vector<TensorView> tensors_;
};
