// Seeds for the fuzz targets, made by our own writers: ./seeds FOLDER writes FOLDER/<target>/<name>.
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "../../../host/checkpoint.h"
#include "../../../host/commands.h"
#include "../../../host/config.h"
#include "../../../host/metrics.h"
#include "../../../host/ngram.h"
#include "../../../host/shards.h"

// A safetensors file without its checksums.
static std::string without_checksums(const std::string& path) {
  const SafetensorsFile file(path);
  nlohmann::ordered_json header;
  header["__metadata__"] = file.metadata();
  std::string data;
  for (const TensorView& t : file.tensors()) {
    header[t.name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {data.size(), data.size() + t.bytes()}}};
    data.append(static_cast<const char*>(t.data), t.bytes());
  }
  const std::string json = header.dump();
  const uint64_t length = json.size();
  std::string all(sizeof length, '\0');
  std::memcpy(all.data(), &length, sizeof length);
  return all + json + data;
}

int main(int argc, char** argv) {
  return run_main([&] {
    if (argc != 2) fail("usage: seeds FOLDER");
    const std::string folder = argv[1];
    const auto seed = [&](const std::string& target, const std::string& name, const std::string& content) {
      make_folder(folder + "/" + target);
      write_file(folder + "/" + target + "/" + name, content);
    };
    const Vocabulary vocabulary({'a', 'b', 'c'});
    make_folder(folder);
    for (const char* target : {"text", "prompt"}) {
      seed(target, "ascii", "ab ba\n");
      seed(target, "wide", "aé€😀\n");
      seed(target, "bom", "\uFEFFab\r\n");
      seed(target, "latin", "caf\xE9");
    }
    for (const char* file : {"today", "protocol5", "legacy"})
      seed("weights", file, read_file(std::string("test/pth/") + file + ".pth"));
    const std::string scratch = folder + "/scratch";
    vocabulary.save(scratch);
    seed("vocabulary", "abc", read_file(scratch));
    Vocabulary({'\n', '"', U'é', U'😀'}).save(scratch);
    seed("vocabulary", "wide", read_file(scratch));

    make_folder(folder + "/shard");
    {
      ShardWriter writer(folder + "/shard", "train", 5, vocabulary, 3);
      const uint16_t tokens[] = {0, 1, 2, 1, 0};
      writer.write(tokens, 5);
      writer.finish();
    }
    const std::string first = read_file(folder + "/shard/train_000000.bin"),
                      second = read_file(folder + "/shard/train_000001.bin");
    seed("shards", "one", std::string(1, '\0') + first);
    seed("shards", "two", std::string(1, char(first.size() / 8)) + first.substr(0, first.size() / 8 * 8) + second);
    std::filesystem::remove_all(folder + "/shard");

    Config config;
    config.n_layer = config.n_head = 1;
    config.n_embd = config.block_size = 2;
    CheckpointInfo info;
    info.shape = model_shape(config, 3);
    info.settings = recorded_settings(config);
    info.state = {{"dtype", "float32"}};
    info.data = "0123";
    const Layout layout = parameter_layout(info.shape);
    const Buffer<float> params(layout), m(layout), v(layout);
    for (const bool moments : {false, true}) {
      save_checkpoint(scratch, info, vocabulary, layout, params.data(), moments ? m.data() : nullptr,
                      moments ? v.data() : nullptr);
      seed("checkpoint", moments ? "last" : "best", without_checksums(scratch));
    }
    write_safetensors(scratch, export_views(info.shape, layout, params.data()), {{"format", "pt"}});
    seed("weights", "safetensors", without_checksums(scratch));
    const float one = 1;
    write_safetensors(scratch, {{"w", "F32", {1}, &one}}, {{"format", "pt"}});
    seed("checkpoint", "other", without_checksums(scratch));

    seed("command_line", "train", "--n_layer=2\n--n_head\n2\n--dropout=0.1\n--decay_lr=true\n--preset\nlecture\n");
    seed("command_line", "sample", "sample\n--start\nab\n--top_k=3\n--temperature=0.5\n--seed=7\n");
    seed("command_line", "eval", "eval\n--checkpoint=best\n--batch_size=4\n--dtype\nfloat32\n");
    seed("command_line", "help", "export\n--help\n");
    {
      Metrics metrics(scratch, 0);
      metrics.add_eval({0, 4.2, 4.3, 4.25, "abc"});
      metrics.add_iter(0, 4.1, 3e-4, 10, 1000);
      metrics.add_final({7, 1.5, 3});
    }
    seed("record", "run", read_file(scratch));
    save_baselines(scratch, {{"uniform", 4.17}, {"5-gram", 1.67}});
    seed("record", "baselines", read_file(scratch));
    std::filesystem::remove(scratch);

    const auto surroundings = [&](const std::string& name, std::initializer_list<const char*> strings) {
      std::string content;
      for (const char* string : strings) content += std::string(string) + '\0';
      seed("surroundings", name, content);
    };
    surroundings("version2", {"0::/a/b\n", "150000 100000\n", "", "", "3000000000\n", "0,4\n", "1,5\n", "de_DE.UTF-8"});
    surroundings("version1", {"9:name=systemd:/\n2:cpu,cpuacct:/c\n4:memory:/\n", "max 100000\n", "300000\n",
                              "100000\n", "max\n", "0-1\n", "0-1\n", "C"});
    return 0;
  });
}
