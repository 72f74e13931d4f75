// --init_from FILE and --checkpoint FILE: a new run from another's weights, whoever wrote them, as a person starts it.
#include <cmath>

#include "../host/run_files.h"
#include "trainer.h"

namespace {

// The exact loss of the weights with which a run began.
double first_loss(const std::string& out) { return lines_of(out + "/metrics.jsonl")[0]["val_fixed"]; }
double last_loss(const std::string& out) { return lines_of(out + "/metrics.jsonl").back()["val_exact"]; }

Run begin_with(const std::string& weights, const std::string& folder, const std::string& flags = "",
               const std::string& out = "/new") {
  return run(train_gpt + " --init_from=" + weights + " --data " + folder + "/data --out_dir " + folder + out +
             " --dtype=float32 --threads=2 --max_iters=3 --eval_iters=1 --batch_size=4 --warmup_iters=0 " + flags);
}

}  // namespace

TEST_CASE("A new run begins where the weights of another file were, and the file may be of any kind") {
  const std::string folder = prepared(), out = folder + "/out", last = last_checkpoint(out);
  REQUIRE(train(folder, "--dtype=float32").code == 0);
  const double loss = last_loss(out);
  Config small;
  apply_preset(small, "small");
  for (const std::string& file : {last, out + "/microGPT_model.pth"}) {
    const Run r = begin_with(file, folder);
    INFO(r.err);
    REQUIRE(r.code == 0);
    CHECK(first_loss(folder + "/new") == Approx(loss).margin(1e-6));
    for (const char* setting :
         {"preset small", "n_layer 1,", "n_head 2,", "n_embd 32,", "block_size 16,", "dropout 0,"})
      CHECK(contains(r.err, setting));
    CHECK(contains(r.err, "a new run, with the weights of " + file + (file == last ? ", after 20 steps\n" : "\n")));
    const CheckpointInfo info = Checkpoint(last_checkpoint(folder + "/new")).info();
    CHECK(info.iteration == 3);
    CHECK(info.settings.at("learning_rate") == recorded_settings(small).at("learning_rate"));
    CHECK(fs::exists(last));
  }
  // It is a run like any other: it repeats, and it can be interrupted.
  const std::string whole = read_file(last_checkpoint(folder + "/new"));
  REQUIRE(begin_with(last, folder, "--decay_lr=false").code == 0);
  const std::string steady = read_file(last_checkpoint(folder + "/new"));
  REQUIRE(begin_with(last, folder, "--decay_lr=false --max_iters=2", "/parts").code == 0);
  const Run r = run(train_gpt + " --init_from=resume --max_iters=3 --dtype=float32 --data " + folder +
                    "/data --out_dir " + folder + "/parts");
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK((read_file(last_checkpoint(folder + "/parts")) == steady));
  CHECK((whole != steady));
}

TEST_CASE("A new run in the folder of the weights that it begins with keeps them") {
  const std::string folder = prepared(), out = folder + "/out";
  REQUIRE(train(folder).code == 0);
  const std::string kept = read_file(last_checkpoint(out)), best = read_file(best_checkpoint(out));
  const double loss = last_loss(out);
  const Run r = begin_with(last_checkpoint(out), folder, "", "/out");
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK((read_file(out + "/run_1/ckpt_last.safetensors") == kept));
  CHECK((read_file(out + "/run_1/ckpt_best.safetensors") == best));
  CHECK(first_loss(out) == Approx(loss).margin(0.01));  // the type of arithmetic may have been another
}

TEST_CASE("A new run may have another text and another block_size") {
  const std::string folder = prepared(), out = folder + "/out", last = last_checkpoint(out);
  REQUIRE(train(folder).code == 0);
  std::string words;
  for (int i = 0; i < 700; i++) words += "bé\n";
  const std::string other = prepared(words);
  const Run r = begin_with(last, other, "--block_size=20");
  INFO(r.err);
  REQUIRE(r.code == 0);
  CHECK(contains(r.err, "2 characters are new to the model and begin at random: \\n é\n"));
  CHECK(contains(r.err, "1 of the model's characters does not occur in this text and is left out: a\n"));
  CHECK(contains(r.err, "its positions 16 to 19 begin at random\n"));
  CHECK(Checkpoint(last_checkpoint(other + "/new")).vocabulary().size() == 3);
  const Run shorter = begin_with(last, folder, "--block_size=5");
  CHECK(shorter.code == 0);
  CHECK(contains(shorter.err, "of its 16 positions the first 5 are kept\n"));
  CHECK(shorter.err.find("at random") == std::string::npos);
}

TEST_CASE("sample, eval, export and page take weights of any kind, and say which") {
  const std::string folder = prepared(), out = folder + "/out", pth = out + "/microGPT_model.pth";
  REQUIRE(train(folder, "--dtype=float32").code == 0);
  const std::string data = " --data " + folder + "/data", to_out = " --out_dir " + out;
  const auto both = [&](const std::string& command, const std::string& where) {
    const std::string with_data = command == " export" ? "" : data;
    const Run ours = run(train_gpt + command + with_data + to_out);
    const Run theirs = run(train_gpt + command + " --checkpoint=" + pth + with_data + where);
    INFO(ours.err << theirs.err);
    CHECK(ours.code == 0);
    CHECK(theirs.code == 0);
    CHECK(contains(ours.err, "weights: " + last_checkpoint(out) + ", after 20 steps\n"));
    CHECK(contains(theirs.err, "weights: " + pth + "\n"));
    if (command != " export")
      CHECK(contains(theirs.err, "2 tokens are taken for the 2 characters in " + folder + "/data"));
    return std::pair{ours.out, theirs.out};
  };
  const auto [a, b] = both(" sample --dtype=float32 --max_new_tokens=40", to_out);
  CHECK(a == b);
  CHECK(a.size() > 40);
  const auto [c, d] = both(" eval --dtype=float32 --eval_iters=2 --batch_size=4", to_out);
  CHECK(c.substr(c.find("val exact")) == d.substr(d.find("val exact")));
  const std::string other_folder = " --out_dir " + folder + "/other";
  both(" export", other_folder);
  CHECK((read_file(folder + "/other/microGPT_model.pth") == read_file(pth)));
  both(" page", other_folder);
  CHECK(contains(read_file(folder + "/other/microGPT.html"), "\"n_embd\":\"32\""));

  // Weights that were better, as the run has recorded: the loss of step 0 is never undercut.
  REQUIRE(train(folder, "--learning_rate=10 --eval_interval=5 --n_embd=4 --grad_clip=1").code == 0);
  CHECK(contains(run(train_gpt + " sample --max_new_tokens=1" + to_out).err,
                 "which --checkpoint best takes, have the lowest validation loss so far"));
  CHECK(run(train_gpt + " sample --max_new_tokens=1 --checkpoint=best" + to_out).err.find("lowest") ==
        std::string::npos);
}

TEST_CASE("Refusals: weights to begin with") {
  const std::string folder = prepared(), last = last_checkpoint(folder + "/out");
  REQUIRE(train(folder).code == 0);
  const auto kept = contents(folder + "/out");
  const auto refused = [&](const std::string& file, const std::string& flags, const std::string& part) {
    check_refused(
        train_gpt + " --init_from=" + file + " --data " + folder + "/data --out_dir " + folder + "/out " + flags, part);
  };
  refused("scrach", "", "--init_from scrach: there is no such file; scratch begins with random weights");
  refused(last, "--n_embd=64", "--n_embd is 64, but the model in " + last + " has 32");
  refused(last, "--n_layer=2 ", "--n_layer is 2");
  refused(last, "--n_head=4 ", "--n_head is 4");
  refused(folder + "/input.txt", "", "input.txt is text: the weights of a model are needed");
  refused(folder, "", folder);
  refused("test/pth/today.pth", "--block_size=200", "--block_size 200");  // the text has 200 characters to validate
  write_file(folder + "/cut.pth", read_file("test/pth/legacy.pth").substr(0, 9000));
  refused(folder + "/cut.pth", "", "cut.pth");
  refused("test/pth/today.pth", "--block_size=190 --n_layer=3", "--n_layer is 3");
  // Weights without a vocabulary, and a text with more characters.
  const std::string three = prepared("abc" + std::string(900, 'a') + std::string(300, 'b'));
  check_refused(train_gpt + " --init_from=test/pth/today.pth --data " + three + "/data --out_dir " + folder + "/out",
                "has no vocabulary, only 2 tokens");
  check_refused(train_gpt + " sample --checkpoint=test/pth/today.pth --data " + three + "/data", "has no vocabulary");
  check_refused(train_gpt + " sample --checkpoint=test/pth/today.pth --data " + three, "vocab.json");
  CHECK((contents(folder + "/out") == kept));
}
