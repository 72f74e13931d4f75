// Python's pickles, read without Python. A pickle is a program for a small stack machine that builds objects. We
// run that program, but call no function: a call becomes a value that holds the function's name and its arguments.
// Python's pickletools.py describes the instructions.
// defines: Pickled, Unpickler
#pragma once
#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <string_view>
#include <vector>

// A value. The values that it is made of belong to the Unpickler; a pickle can put one into several others.
struct Pickled {
  enum class Kind {
    none,      // None, and the numbers that are not whole
    integer,   // also False and True
    text,      // a str, or an integer of more than 64 bits as its bytes, the lowest first
    sequence,  // a list or tuple
    dict,      // items: key, value, key, value, ...
    function,  // text: its name, "torch._utils._rebuild_tensor_v2"
    call,      // text: the function; items: one, the sequence of its arguments
    outside,   // an object that lies outside of the pickle; items: one, what names it (pickle.py's persistent id)
  };
  Kind kind = Kind::none;
  int64_t integer = 0;
  std::string text = "";
  std::vector<const Pickled*> items = {};

  const Pickled* entry(std::string_view key) const;  // of a dict; nullptr if it has none
};

class Unpickler {
 public:
  // what: names the file in messages. functions: those that may be named in the pickle, besides OrderedDict. Others are
  // refused, for they stand for objects that only a program of their own can build.
  Unpickler(std::string what, std::set<std::string> functions)
      : what_(std::move(what)), functions_(std::move(functions)) {}

  // Reads the pickle with which bytes begin and takes it off them. The value lives as long as this object.
  const Pickled& read(std::string_view& bytes);
  // The objects outside of the pickle that the last one to be read refers to.
  const std::vector<const Pickled*>& outside() const { return outside_; }

 private:
  void make(Pickled::Kind kind, std::string text = "", std::vector<const Pickled*> items = {}, int64_t integer = 0);
  Pickled& pop();
  std::vector<const Pickled*> pop_to_mark();
  Pickled& top();
  std::string_view take(size_t count);
  uint64_t number(size_t bytes);  // little-endian
  std::string_view line();
  void push_function(const std::string& name);
  void call();
  void add_items(std::vector<const Pickled*> items, Pickled::Kind kind);
  bool step(unsigned char instruction);
  [[noreturn]] void refuse(const std::string& why) const;

  std::string what_;
  std::set<std::string> functions_;
  std::deque<Pickled> values_;  // all that were made
  std::string_view rest_;
  std::vector<Pickled*> stack_;
  std::vector<size_t> marks_;  // how high the stack was at each mark
  std::vector<const Pickled*> outside_;
  std::vector<Pickled*> memo_;  // values by number, for the pickle to come back to
};
