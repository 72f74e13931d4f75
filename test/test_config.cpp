#include <vector>

#include "../host/config.h"
#include "test.h"

namespace {

Config parse(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "train_gpt");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  return parse_command_line(int(argv.size()), argv.data());
}

std::string refusal(const std::vector<std::string>& arguments) {
  return error_of([&] { parse(arguments); });
}

}  // namespace

TEST_CASE("Without flags the configuration is the course's") {
  const Config c = parse({});
  CHECK(c.command == "train");
  CHECK(c.n_layer == 6);
  CHECK(c.n_head == 6);
  CHECK(c.n_embd == 384);
  CHECK(c.block_size == 256);
  CHECK(c.batch_size == 64);
  CHECK(c.max_iters == 5000);
  CHECK(c.learning_rate == 3e-4);
  CHECK(c.dropout == 0.2);
  CHECK(c.weight_decay == 0.01);
  CHECK(c.eval_interval == 500);
  CHECK(c.eval_iters == 200);
}

TEST_CASE("Flags are written as --k v and --k=v, and the last one counts") {
  const Config c = parse({"--batch_size", "12", "--dropout=0.5", "--decay_lr=True", "--seed", "18446744073709551615",
                          "--learning_rate=1e-3", "--batch_size=13", "--out_dir=a=b"});
  CHECK(c.batch_size == 13);
  CHECK(c.dropout == 0.5);
  CHECK(c.decay_lr);
  CHECK(c.seed == 18446744073709551615ull);
  CHECK(c.learning_rate == 1e-3);
  CHECK(c.out_dir == "a=b");
  CHECK(c.given == std::set<std::string>{"batch_size", "dropout", "decay_lr", "seed", "learning_rate", "out_dir"});
  CHECK(parse({"sample", "--start", "--start=O God", "--top_k=5"}).command == "sample");
  CHECK(parse({"sample", "--start=O God, O God!"}).start == "O God, O God!");
  CHECK(parse({"sample", "--start="}).start.empty());
}

TEST_CASE("What cannot be is refused, with the range or the nearest name") {
  CHECK(refusal({"--bath_size", "3"}) == "--bath_size is not a flag of train; the nearest is --batch_size, see --help");
  CHECK(refusal({"--batch_size", "0"}) == "--batch_size is a whole number from 1 to 2000000000, not '0'");
  CHECK(refusal({"--batch_size", "2.5"}) == "--batch_size is a whole number from 1 to 2000000000, not '2.5'");
  CHECK(refusal({"--batch_size", "many"}) == "--batch_size is a whole number from 1 to 2000000000, not 'many'");
  CHECK(refusal({"--batch_size=99999999999999999999"}) ==
        "--batch_size is a whole number from 1 to 2000000000, not '99999999999999999999'");
  CHECK(refusal({"--dropout=1"}) == "--dropout is a number from 0 to 0.99, not '1'");
  CHECK(refusal({"--dropout=nan"}) == "--dropout is a number from 0 to 0.99, not 'nan'");
  CHECK(refusal({"--learning_rate=-1"}) == "--learning_rate is a number from 0 to 10, not '-1'");
  CHECK(refusal({"--learning_rate=0,001"}) == "--learning_rate is a number from 0 to 10, not '0,001'");
  CHECK(refusal({"--grad_clip=inf"}) == "--grad_clip is a number of at least 0, not 'inf'");
  CHECK(refusal({"--seed=-1"}) == "--seed is a whole number from 0 to 18446744073709551615, not '-1'");
  CHECK(refusal({"--decay_lr=maybe"}) == "--decay_lr is true or false, not 'maybe'");
  CHECK(refusal({"--device=tpu"}) == "--device is one of auto cuda cpu, not 'tpu'");
  CHECK(refusal({"--dtype=int8"}) == "--dtype is one of auto float32 tf32 bfloat16 float16, not 'int8'");
  CHECK(refusal({"sample", "--max_iters=3"}) == "--max_iters is a flag of train, not of sample");
  CHECK(refusal({"--top_k=3"}) == "--top_k is a flag of sample, not of train");
  CHECK(refusal({"smaple"}) == "'smaple' is not a command (train, sample, eval, export, page); the nearest is sample");
  CHECK(refusal({"train", "more"}).find("'more' is not a flag") == 0);
  CHECK(refusal({"-x"}).find("'-x' is not a flag") == 0);
  CHECK(refusal({"--batch_size"}).find("--batch_size") != std::string::npos);

  Config c;
  c.n_embd = 100;
  c.n_head = 3;
  CHECK_THROWS_WITH(model_shape(c, 65),
                    "--n_embd 100 is not a multiple of --n_head 3: every head gets n_embd / n_head channels");
}

TEST_CASE("A preset sets what was not given") {
  Config c = parse({"--batch_size=5"});
  apply_preset(c, "small");
  CHECK(c.batch_size == 5);
  CHECK(c.n_embd < 384);
  CHECK(c.decay_lr);
  Config best = parse({"--n_head=2"});
  apply_preset(best, "best");
  CHECK(best.n_head == 2);
  CHECK(best.n_embd > c.n_embd);
  CHECK(best.learning_rate < c.learning_rate);
  CHECK(best.optimizer == c.optimizer);  // as small, where it says nothing else
  CHECK(best.block_size == c.block_size);
  Config lecture = parse({});
  apply_preset(lecture, "lecture");
  CHECK(lecture.n_embd == 384);

  const std::string help = help_text("train");
  CHECK(contains(help, text("--n_embd 384 (small: ", c.n_embd, ", best: ", best.n_embd, ") ")));
  CHECK(contains(help, text("--block_size 256 (small: ", c.block_size, ") ")));
  CHECK(contains(help, "--eval_interval 500  "));
  CHECK(help_text("eval").find("small: ") == std::string::npos);  // eval_iters is a flag of both
}

TEST_CASE("What is recorded is read back, and what differs is said or refused") {
  Config trained = parse({"--batch_size=5", "--n_layer=3", "--learning_rate=0.000123456789", "--decay_lr=true"});
  const auto settings = recorded_settings(trained);
  CHECK(settings.count("out_dir") == 0);
  CHECK(settings.count("threads") == 0);

  Config resumed = parse({"--learning_rate=0.5", "--batch_size=5"});
  CHECK(apply_settings(resumed, settings) == std::vector<std::string>{"learning_rate: 0.000123456789 -> 0.5"});
  CHECK(resumed.n_layer == 3);
  CHECK(resumed.decay_lr);
  Config other = parse({"--n_layer=4"});
  CHECK(contains(error_of([&] { apply_settings(other, settings); }), "--n_layer is 4, but the checkpoint's run has 3"));
  // Muon's moments are not AdamW's.
  Config moments = parse({"--optimizer=muon"});
  CHECK(contains(error_of([&] { apply_settings(moments, settings); }),
                 "--optimizer is muon, but the checkpoint's run has adamw"));
}

TEST_CASE("Help lists every flag of a command with its default") {
  const std::string help = help_text("train");
  for (const std::string& name : recorded_flags()) CHECK(help.find("--" + name + " ") != std::string::npos);
  CHECK(help_text("sample").find("--top_k 0") != std::string::npos);
  CHECK(help_text("sample").find("--max_iters") == std::string::npos);
  for (const char* command : {"train", "sample", "eval", "export"}) {
    CHECK(parse({command, "--help"}).help);
    CHECK(parse({command, "--version"}).version);
  }
}
