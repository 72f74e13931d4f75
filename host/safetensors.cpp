#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "error.h"
#include "text.h"

namespace {

using Json = nlohmann::ordered_json;
static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr const char* metadata_name = "__metadata__";
constexpr std::string_view zeros = "0000000000000000";
constexpr size_t longest_header = 100'000'000;  // the limit of the format's own library

bool is_checksum(const std::string& name) { return name == "checksum" || name.rfind("checksum.", 0) == 0; }

// Where the header's own checksum stands in its text. Inside a JSON string the quotes would be escaped, so that only
// the key itself matches.
size_t find_header_checksum(std::string_view header) {
  constexpr std::string_view key = "\"checksum\":\"";
  const size_t at = header.find(key);
  return at == std::string_view::npos || header.size() - at < key.size() + zeros.size() ? std::string_view::npos
                                                                                        : at + key.size();
}

std::string header_checksum(std::string header, size_t digits) {
  header.replace(digits, zeros.size(), zeros);
  return hash_text(checksum(header.data(), header.size()));
}

// Parses a header. Beyond well-formed JSON it asks for what could make two readers see two different files (a name
// given twice) or one overflow its stack (deep nesting).
Json parse_header(const std::string& path, std::string_view header) {
  std::set<std::string> names;
  const auto check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > 3) fail("could not read ", path, ": its header is nested too deeply for a safetensors file");
    if (event == Json::parse_event_t::key && depth == 1 && !names.insert(value.get<std::string>()).second)
      fail("could not read ", path, ": its header has two entries named '", value.get<std::string>(), "'");
    return true;
  };
  try {
    Json json = Json::parse(header.begin(), header.end(), check);
    if (!json.is_object()) fail("could not read ", path, ": its header is no JSON object");
    return json;
  } catch (const Json::parse_error& e) {
    fail("could not read ", path, ": its header is no valid JSON (byte ", 8 + e.byte,
         "): it is damaged or no safetensors file");
  } catch (const Json::out_of_range&) {
    fail("could not read ", path, ": its header has a number beyond all limits: it is damaged or no safetensors file");
  }
}

size_t to_size(const Json& number, const std::string& where) {
  if (!number.is_number_unsigned()) fail(where, " has a shape or offset that is no whole number");
  return number.get<size_t>();
}

// A tensor, and where it lies in the data.
struct Placed {
  TensorView view;
  size_t begin, end;
};

Placed parse_tensor(const std::string& where, const std::string& name, const Json& entry, const unsigned char* data,
                    size_t data_bytes) {
  if (!entry.contains("dtype") || !entry["dtype"].is_string() || !entry.contains("shape") ||
      !entry["shape"].is_array() || !entry.contains("data_offsets") || !entry["data_offsets"].is_array() ||
      entry["data_offsets"].size() != 2)
    fail(where, " lacks a type, a shape or two offsets");
  Placed t;
  t.view.name = name;
  t.view.dtype = entry["dtype"].get<std::string>();
  for (const Json& extent : entry["shape"]) t.view.shape.push_back(to_size(extent, where));
  t.begin = to_size(entry["data_offsets"][0], where);
  t.end = to_size(entry["data_offsets"][1], where);
  if (t.begin > t.end) fail(where, " ends (at ", t.end, ") before it begins (at ", t.begin, ")");
  if (t.end > data_bytes)
    fail(where, " should lie at bytes ", t.begin, " to ", t.end, " of the data, but there are only ", data_bytes,
         ": the file is cut off");
  if (t.view.bytes() != t.end - t.begin)
    fail(where, " has ", t.end - t.begin, " bytes, but its type and shape need ", t.view.bytes());
  t.view.data = data + t.begin;
  return t;
}

}  // namespace

std::string shape_text(const std::vector<size_t>& shape) {
  std::string out;
  for (const size_t n : shape) out += (out.empty() ? "" : ", ") + std::to_string(n);
  return "(" + out + ")";
}

size_t dtype_size(const std::string& dtype) {
  static const std::map<std::string, size_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
      {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

size_t TensorView::bytes() const {
  size_t total = dtype_size(dtype);
  if (total == 0) fail("tensor ", name, " has the unknown type '", dtype, "'");
  for (size_t extent : shape)
    if (__builtin_mul_overflow(total, extent, &total)) fail("tensor ", name, " is too large: its size overflows");
  return total;
}

void write_safetensors(const std::string& path, const std::vector<TensorView>& tensors, const Metadata& metadata) {
  // The format allows no gaps, so alignment is a matter of order.
  std::vector<const TensorView*> order;
  for (const TensorView& t : tensors) order.push_back(&t);
  std::stable_sort(order.begin(), order.end(), [](const TensorView* a, const TensorView* b) {
    return dtype_size(a->dtype) > dtype_size(b->dtype);
  });

  Metadata all = metadata;
  for (const auto& [name, value] : metadata)
    if (is_checksum(name)) fail("could not write ", path, ": the name ", name, " is reserved");
  for (const TensorView* t : order) all["checksum." + t->name] = hash_text(checksum(t->data, t->bytes()));
  all["checksum"] = zeros;

  Json json;
  json[metadata_name] = all;
  size_t offset = 0;
  for (const TensorView* t : order) {
    if (json.contains(t->name)) fail("could not write ", path, ": two tensors are named '", t->name, "'");
    json[t->name] = {{"dtype", t->dtype}, {"shape", t->shape}, {"data_offsets", {offset, offset + t->bytes()}}};
    offset += t->bytes();
  }
  std::string header = json.dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');  // the data starts at a multiple of 8
  const size_t digits = find_header_checksum(header);
  header.replace(digits, zeros.size(), header_checksum(header, digits));

  AtomicFile file(path);
  const uint64_t length = header.size();
  file.write(&length, sizeof length);
  file.write(header.data(), header.size());
  for (const TensorView* t : order) file.write(t->data, t->bytes());
  file.commit();
}

SafetensorsFile::SafetensorsFile(const std::string& path, Verify what) : path_(path), file_(path) {
  refuse_other(path, {reinterpret_cast<const char*>(file_.data()), file_.size()}, "a safetensors file",
               "a checkpoint of this program is needed, such as ckpt_last.safetensors");
  uint64_t length = 0;
  if (file_.size() < sizeof length)
    fail("could not read ", path, ": it has only ", file_.size(), " bytes, too few for a safetensors file");
  std::memcpy(&length, file_.data(), sizeof length);
  if (length > longest_header || length > file_.size() - sizeof length)
    fail("could not read ", path, ": its first 8 bytes announce a header of ", length, " bytes, but the file has ",
         file_.size(), ": it is cut off or no safetensors file");
  const std::string_view header(reinterpret_cast<const char*>(file_.data()) + sizeof length, length);
  const unsigned char* data = file_.data() + sizeof length + length;
  const size_t data_bytes = file_.size() - sizeof length - length;
  const Json json = parse_header(path, header);

  std::vector<Placed> placed;
  for (const auto& [name, entry] : json.items()) {
    const std::string where = "could not read " + path + ": " + name;
    if (!entry.is_object()) fail(where, " is no JSON object");
    if (name == metadata_name) {
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) fail(where, ": ", key, " is no text");
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    placed.push_back(parse_tensor(where, name, entry, data, data_bytes));
  }

  // One after the other, from the first byte of the data to the last.
  std::stable_sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  size_t end = 0;
  for (Placed& t : placed) {
    if (t.begin != end)
      fail("could not read ", path, ": ", t.view.name, " begins at byte ", t.begin,
           " of the data, but what comes before ", "it ends at ", end);
    end = t.end;
    tensors_.push_back(std::move(t.view));
  }
  if (end != data_bytes)
    fail("could not read ", path, ": it has ", data_bytes, " bytes of data, but its tensors end at ", end);

  verify_checksums(header, what);
}

// One checksum makes all of them due: a damaged name cannot pass for a file without.
void SafetensorsFile::verify_checksums(std::string_view header, Verify what) {
  const bool ours = std::any_of(metadata_.begin(), metadata_.end(), [](const auto& m) { return is_checksum(m.first); });
  if (!ours) return;
  const auto verify = [&](const std::string& part, const std::string& key, const std::string& actual) {
    const auto said = metadata_.find(key);
    if (said == metadata_.end()) fail(path_, ": ", part, " is damaged: its checksum is missing");
    if (said->second != actual)
      fail(path_, ": ", part, " is damaged: its checksum is ", actual, ", the file says ", said->second);
  };
  const size_t digits = find_header_checksum(header);
  if (digits == std::string_view::npos) fail(path_, ": the header is damaged: its checksum is missing");
  verify("the header", "checksum", header_checksum(std::string(header), digits));
  if (what == Verify::all)
    for (const TensorView& t : tensors_)
      verify("tensor " + t.name, "checksum." + t.name, hash_text(checksum(t.data, t.bytes())));
  std::erase_if(metadata_, [](const auto& m) { return is_checksum(m.first); });
}

const TensorView* SafetensorsFile::maybe(const std::string& name) const {
  const auto found =
      std::find_if(tensors_.begin(), tensors_.end(), [&](const TensorView& t) { return t.name == name; });
  return found == tensors_.end() ? nullptr : &*found;
}

const TensorView& SafetensorsFile::find(const std::string& name) const {
  const TensorView* found = maybe(name);
  if (found == nullptr) fail(path_, " has no tensor named ", name);
  return *found;
}
