// PyTorch's files, read. pth.cpp describes the format of today. Before PyTorch 1.6 a file was
//   a pickle of the number 0x1950a86a20f9469cfc6c; one of the number 1001; one about the machine
//   a pickle of the object, in which each tensor refers to a storage by its key
//   a pickle of the list of all keys, and in its order the storages: the number of elements in 8 bytes, and the elements
#include <zip.h>

#include <cstdint>
#include <cstring>

#include "error.h"
#include "pth.h"

namespace {

// A state dict's pickle takes some hundred bytes a tensor. What we build of a pickle can take eighty times its size.
constexpr size_t longest_pickle = 4 << 20;
constexpr size_t most_entries = 100'000;

const std::map<std::string, const char*> storage_types = {
    {"torch.FloatStorage", "F32"},  {"torch.HalfStorage", "F16"}, {"torch.BFloat16Storage", "BF16"},
    {"torch.DoubleStorage", "F64"}, {"torch.LongStorage", "I64"}, {"torch.IntStorage", "I32"},
    {"torch.ShortStorage", "I16"},  {"torch.CharStorage", "I8"},  {"torch.ByteStorage", "U8"},
    {"torch.BoolStorage", "BOOL"}};

constexpr const char* rebuild_tensor = "torch._utils._rebuild_tensor_v2";
constexpr const char* rebuild_parameter = "torch._utils._rebuild_parameter";

std::set<std::string> known_functions() {
  std::set<std::string> known = {rebuild_tensor,  rebuild_parameter, "torch.Size",     "torch.device",
                                 "torch.float32", "torch.float16",   "torch.bfloat16", "torch.float64"};
  for (const auto& [name, dtype] : storage_types) known.insert(name);
  return known;
}

// 0x1950a86a20f9469cfc6c, the lowest byte first
constexpr std::string_view legacy_magic = "\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

bool is(const Pickled& value, Pickled::Kind kind) { return value.kind == kind; }

}  // namespace

struct PthFile::Storage {
  std::string dtype, key;
};

bool PthFile::looks_like_one(std::string_view bytes) {
  return bytes.starts_with("PK\3\4") || (bytes.size() > 1 && bytes[0] == '\x80' && bytes[1] >= 2 && bytes[1] <= 5);
}

PthFile::PthFile(const std::string& path) : path_(path), file_(path), unpickler_(path, known_functions()) {
  const std::string_view bytes(reinterpret_cast<const char*>(file_.data()), file_.size());
  if (bytes.starts_with("PK")) {
    zip_error_t error;
    zip_error_init(&error);
    zip_source_t* const source = zip_source_buffer_create(file_.data(), file_.size(), 0, &error);
    if (source) zip_ = zip_open_from_source(source, ZIP_RDONLY, &error);
    if (!zip_) {
      zip_source_free(source);
      fail("could not read ", path_, ": ", zip_error_strerror(&error), ": it is cut off or no zip archive");
    }
    try {
      read_zip();
    } catch (...) {
      zip_discard(zip_);
      throw;
    }
    zip_discard(zip_);
  } else {
    read_legacy();
  }
}

// The content of a record; torch stores it as it is. The archive's checksum is compared.
static std::string record(zip_t* zip, const std::string& path, const std::string& name, size_t most) {
  zip_stat_t info;
  if (zip_stat(zip, name.c_str(), 0, &info) != 0) fail("could not read ", path, ": the archive has no ", name);
  if (info.comp_method != ZIP_CM_STORE || info.encryption_method != ZIP_EM_NONE)
    fail("could not read ", path, ": ", name, " is compressed or encrypted, as torch.save never does");
  if (info.size > most) fail("could not read ", path, ": ", name, " has ", info.size, " bytes, more than ", most);
  std::string content(info.size, '\0');
  zip_file_t* const file = zip_fopen(zip, name.c_str(), 0);
  const bool read = file && zip_fread(file, content.data(), content.size()) == zip_int64_t(content.size());
  char beyond;
  const bool whole = read && zip_fread(file, &beyond, 1) == 0;  // only here is the checksum compared
  if (file) zip_fclose(file);
  if (!whole) fail("could not read ", path, ": ", name, " is damaged");
  return content;
}

void PthFile::read_zip() {
  constexpr std::string_view pickle_name = "/data.pkl";
  for (zip_int64_t i = 0; i < zip_get_num_entries(zip_, 0) && folder_.empty(); i++) {
    const char* const name = zip_get_name(zip_, zip_uint64_t(i), 0);
    if (name && std::string_view(name).ends_with(pickle_name))
      folder_ = std::string(name, std::strlen(name) - pickle_name.size() + 1);
  }
  if (folder_.empty()) fail(path_, " is a zip archive, but not one that torch.save wrote: it has no data.pkl");
  if (zip_name_locate(zip_, (folder_ + "byteorder").c_str(), 0) >= 0)
    if (const std::string order = record(zip_, path_, folder_ + "byteorder", 100); order != "little")
      fail(path_, " was written on a machine of the byte order '", order, "'; this one's is little");
  const std::string pickle = record(zip_, path_, folder_ + "data.pkl", longest_pickle);
  std::string_view rest = pickle;
  add_tensors(unpickler_.read(rest), "");
}

void PthFile::read_legacy() {
  std::string_view rest(reinterpret_cast<const char*>(file_.data()), file_.size());
  const auto read = [&]() -> const Pickled& {
    std::string_view pickle = rest.substr(0, longest_pickle);
    const size_t before = pickle.size();
    const Pickled& value = unpickler_.read(pickle);
    rest.remove_prefix(before - pickle.size());
    return value;
  };
  if (const Pickled& magic = read(); !is(magic, Pickled::Kind::text) || magic.text != legacy_magic)
    fail(path_, " is a pickle, but not one that torch.save wrote");
  if (const Pickled& version = read(); version.integer != 1001)
    fail(path_, " has the version ", version.integer, " of torch.save's old format; 1001 is known");
  if (const Pickled* little = read().entry("little_endian"); little && little->integer == 0)
    fail(path_, " was written on a big-endian machine; this one is little-endian");
  const Pickled& object = read();
  const std::vector<const Pickled*> outside = unpickler_.outside();

  std::map<std::string, size_t> sizes;  // of an element, by the storage's key
  for (const Pickled* described : outside) {
    const Storage s = storage(*described);
    sizes.emplace(s.key, dtype_size(s.dtype));
  }
  for (const Pickled* key : read().items) {
    const auto size = sizes.find(key->text);
    if (size == sizes.end()) fail("could not read ", path_, ": nothing in it describes its storage ", key->text);
    uint64_t elements = 0, bytes = 0;
    if (rest.size() < sizeof elements) fail("could not read ", path_, ": it is cut off");
    std::memcpy(&elements, rest.data(), sizeof elements);
    rest.remove_prefix(sizeof elements);
    if (__builtin_mul_overflow(elements, size->second, &bytes) || bytes > rest.size())
      fail("could not read ", path_, ": its storage ", key->text, " should have ", elements,
           " elements, and the file ends before them: it is cut off");
    legacy_.emplace(key->text, rest.substr(0, bytes));
    rest.remove_prefix(bytes);
  }
  add_tensors(object, "");
}

void PthFile::add_tensors(const Pickled& dict, const std::string& prefix) {
  for (size_t i = 0; i + 1 < dict.items.size() && is(dict, Pickled::Kind::dict); i += 2) {
    if (++entries_ > most_entries) fail("could not read ", path_, ": it has more than ", most_entries, " entries");
    const Pickled &key = *dict.items[i], *value = dict.items[i + 1];
    if (!is(key, Pickled::Kind::text)) continue;
    if (is(*value, Pickled::Kind::call) && value->text == rebuild_parameter && !value->items[0]->items.empty())
      value = value->items[0]->items[0];
    if (is(*value, Pickled::Kind::call) && value->text == rebuild_tensor)
      tensors_.push_back(tensor(prefix + key.text, *value));
    else if (is(*value, Pickled::Kind::dict) && prefix.empty())
      add_tensors(*value, key.text + ".");
  }
}

// torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)
TensorView PthFile::tensor(const std::string& name, const Pickled& call) {
  const std::vector<const Pickled*>& arguments = call.items[0]->items;
  const auto numbers = [&](const Pickled& sequence) {
    std::vector<size_t> out;
    for (const Pickled* n : sequence.items) {
      if (!is(*n, Pickled::Kind::integer) || n->integer < 0)
        fail("could not read ", path_, ": ", name, " has a size that is no number");
      out.push_back(size_t(n->integer));
    }
    return out;
  };
  if (arguments.size() < 4 || !is(*arguments[0], Pickled::Kind::outside) ||
      !is(*arguments[1], Pickled::Kind::integer) || arguments[1]->integer < 0)
    fail("could not read ", path_, ": ", name, " is not described as a tensor is");
  const Storage s = storage(*arguments[0]);
  TensorView view{name, s.dtype, numbers(*arguments[2]), nullptr, numbers(*arguments[3])};
  if (view.shape.size() != view.stride.size() || view.shape.size() > 8)
    fail("could not read ", path_, ": ", name, " has the shape ", shape_text(view.shape), " and the strides ",
         shape_text(view.stride));

  // The elements run from the offset to the largest index.
  const std::string_view bytes = bytes_of(s);
  const size_t offset = size_t(arguments[1]->integer), size = dtype_size(s.dtype);
  size_t last = offset;
  bool fits = true, empty = false;
  for (size_t d = 0; d < view.shape.size(); d++) {
    if (view.shape[d] == 0) empty = true;
    size_t span = 0;
    if (view.shape[d] > 0) fits = fits && !__builtin_mul_overflow(view.shape[d] - 1, view.stride[d], &span);
    fits = fits && !__builtin_add_overflow(last, span, &last);
  }
  if (!empty && (!fits || last >= bytes.size() / size))
    fail("could not read ", path_, ": ", name, " ", shape_text(view.shape), " reaches beyond its storage of ",
         bytes.size(), " bytes");
  view.bytes();  // it refuses a size that overflows
  view.data = empty ? bytes.data() : bytes.data() + offset * size;
  return view;
}

// ("storage", type, key, device, elements): what a tensor's pickle says of the bytes outside of it
PthFile::Storage PthFile::storage(const Pickled& outside) const {
  const std::vector<const Pickled*>& id = outside.items[0]->items;
  if (id.size() < 5 || id[0]->text != "storage" || !is(*id[1], Pickled::Kind::function) ||
      !is(*id[2], Pickled::Kind::text))
    fail("could not read ", path_, ": its pickle refers to something that is no storage");
  const auto type = storage_types.find(id[1]->text);
  if (type == storage_types.end()) fail("could not read ", path_, ": ", id[1]->text, " is no storage of numbers");
  return {type->second, id[2]->text};
}

std::string_view PthFile::bytes_of(const Storage& storage) {
  if (!zip_) {
    const auto found = legacy_.find(storage.key);
    if (found == legacy_.end()) fail("could not read ", path_, ": it has no storage ", storage.key);
    return found->second;
  }
  const auto found = unzipped_.find(storage.key);
  if (found != unzipped_.end()) return found->second;
  return unzipped_.emplace(storage.key, record(zip_, path_, folder_ + "data/" + storage.key, file_.size()))
      .first->second;
}
