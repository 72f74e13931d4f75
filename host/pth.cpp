// The format, as torch/serialization.py reads it: a zip archive of uncompressed records,
//   archive/data.pkl     the state dict, pickled; each tensor refers to a storage by number
//   archive/byteorder    "little"
//   archive/data/<n>     the bytes of storage n
//   archive/version      "3\n"
#include "pth.h"

#include <zip.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <map>

#include "error.h"
#include "files.h"

namespace {

static_assert(std::endian::native == std::endian::little, "the archive says \"little\"");

// A storage: its number in the archive, and how many elements the largest tensor that views it needs.
struct Storage {
  size_t index = 0, elements = 0;
};
using Storages = std::map<const void*, Storage>;  // by the address of the data

// The few instructions of pickle's stack machine (protocol 2, see Python's pickletools.py) that a state dict needs.
class Pickle {
 public:
  void op(char code) { out_ += code; }
  void global(const char* module, const char* name) { out_ += text('c', module, '\n', name, '\n'); }
  void string(const std::string& s) {  // BINUNICODE
    op('X');
    little_endian(s.size(), 4);
    out_ += s;
  }
  void integer(uint64_t value) {
    if (value < (uint64_t{1} << 31)) {  // BININT, signed
      op('J');
      little_endian(value, 4);
    } else {  // LONG1, nine bytes: the last keeps the sign bit clear
      op('\x8a');
      op(9);
      little_endian(value, 8);
      op(0);
    }
  }
  void tuple(const std::vector<size_t>& values) {
    op('(');
    for (size_t value : values) integer(value);
    op('t');
  }
  std::string& bytes() { return out_; }

 private:
  void little_endian(uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) out_ += char(value >> 8 * i);
  }
  std::string out_;
};

void pickle_ordered_dict(Pickle& p) {  // collections.OrderedDict()
  p.global("collections", "OrderedDict");
  p.op(')');
  p.op('R');
}

// torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)
void pickle_tensor(Pickle& p, const TensorView& t, const Storage& storage) {
  std::vector<size_t> stride(t.shape.size(), 1);
  for (size_t i = t.shape.size(); i-- > 1;) stride[i - 1] = stride[i] * std::max<size_t>(t.shape[i], 1);

  p.global("torch._utils", "_rebuild_tensor_v2");
  p.op('(');
  {  // the storage is a persistent id: ("storage", type, key, device, elements)
    p.op('(');
    p.string("storage");
    p.global("torch", "FloatStorage");
    p.string(std::to_string(storage.index));
    p.string("cpu");
    p.integer(storage.elements);
    p.op('t');
    p.op('Q');
  }
  p.integer(0);
  p.tuple(t.shape);
  p.tuple(stride);
  p.op('\x89');  // False
  pickle_ordered_dict(p);
  p.op('t');
  p.op('R');
}

std::string pickle_state_dict(const std::vector<TensorView>& tensors, const Storages& storages) {
  Pickle p;
  p.op('\x80');
  p.op(2);
  pickle_ordered_dict(p);
  p.op('(');
  for (const TensorView& t : tensors) {
    p.string(t.name);
    pickle_tensor(p, t, storages.at(t.data));
  }
  p.op('u');
  p.op('.');
  return std::move(p.bytes());
}

// A zip archive in memory: libzip puts the records together, AtomicFile brings them to the disk.
class Archive {
 public:
  explicit Archive(const std::string& path) : path_(path) {
    zip_error_t error;
    zip_error_init(&error);
    memory_ = zip_source_buffer_create(nullptr, 0, 0, &error);
    if (memory_ != nullptr) zip_ = zip_open_from_source(memory_, ZIP_TRUNCATE, &error);
    if (zip_ == nullptr) fail("could not write ", path_, ": ", zip_error_strerror(&error));
    zip_source_keep(memory_);  // closing the archive gives up one reference, reading the result needs another
  }
  ~Archive() {
    if (zip_ != nullptr) zip_discard(zip_);
    zip_source_free(memory_);
  }
  Archive(const Archive&) = delete;
  Archive& operator=(const Archive&) = delete;

  // Adds a record; its data must stay where it is until write().
  void add(const std::string& record, const void* data, size_t bytes) {
    zip_source_t* source = zip_source_buffer(zip_, data, bytes, 0);
    const std::string name = "archive/" + record;
    const zip_int64_t index = source == nullptr ? -1 : zip_file_add(zip_, name.c_str(), source, ZIP_FL_ENC_GUESS);
    if (index < 0) {
      zip_source_free(source);
      check(false);
    }
    const zip_uint64_t i = zip_uint64_t(index);
    check(zip_set_file_compression(zip_, i, ZIP_CM_STORE, 0) == 0);
    check(zip_file_set_dostime(zip_, i, 0, 1 << 5 | 1, 0) == 0);  // 1980-01-01, the first date a zip knows

    // Like torch we align the data to 64 bytes, with an extra field "FB" of as many bytes as it takes. libzip writes
    // the records in this order and nothing between them, so that we know where each will begin.
    constexpr size_t local_header = 30, field_header = 4, alignment = 64;
    const size_t begin = end_ + local_header + name.size() + field_header;
    const std::string padding((alignment - begin % alignment) % alignment, 'Z');
    check(zip_file_extra_field_set(zip_, i, 0x4246, ZIP_EXTRA_FIELD_NEW,
                                   reinterpret_cast<const zip_uint8_t*>(padding.data()), zip_uint16_t(padding.size()),
                                   ZIP_FL_LOCAL) == 0);
    end_ = begin + padding.size() + bytes;
  }

  void write() {
    check(zip_close(zip_) == 0);
    zip_ = nullptr;
    zip_stat_t info;
    AtomicFile file(path_);
    bool good = zip_source_stat(memory_, &info) == 0 && zip_source_open(memory_) == 0;
    std::string piece(1 << 20, '\0');
    for (zip_uint64_t left = good ? info.size : 0; good && left > 0;) {
      const zip_int64_t n = zip_source_read(memory_, piece.data(), piece.size());
      good = n > 0;
      if (!good) break;
      file.write(piece.data(), size_t(n));
      left -= zip_uint64_t(n);
    }
    if (!good) fail("could not write ", path_, ": ", zip_error_strerror(zip_source_error(memory_)));
    zip_source_close(memory_);
    file.commit();
  }

 private:
  void check(bool good) {
    if (!good) fail("could not write ", path_, ": ", zip_strerror(zip_));
  }

  std::string path_;
  zip_source_t* memory_ = nullptr;
  zip_t* zip_ = nullptr;
  size_t end_ = 0;  // where the records so far will end in the file
};

}  // namespace

void write_pth(const std::string& path, const std::vector<TensorView>& tensors) {
  Storages storages;
  std::vector<const void*> order;  // storages are numbered as they first appear
  for (const TensorView& t : tensors) {
    if (t.dtype != "F32") fail("could not write ", path, ": tensor ", t.name, " is ", t.dtype, ", not F32");
    const auto [found, is_new] = storages.try_emplace(t.data, Storage{order.size(), 0});
    if (is_new) order.push_back(t.data);
    found->second.elements = std::max(found->second.elements, t.bytes() / sizeof(float));
  }

  const std::string pickle = pickle_state_dict(tensors, storages), byteorder = "little", version = "3\n";
  Archive archive(path);
  archive.add("data.pkl", pickle.data(), pickle.size());
  archive.add("byteorder", byteorder.data(), byteorder.size());
  for (const void* data : order) {
    const Storage& storage = storages.at(data);
    archive.add("data/" + std::to_string(storage.index), data, storage.elements * sizeof(float));
  }
  archive.add("version", version.data(), version.size());
  archive.write();
}
