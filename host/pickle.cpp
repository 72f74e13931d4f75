#include "pickle.h"

#include <algorithm>
#include <utility>

#include "error.h"

using Kind = Pickled::Kind;

const Pickled* Pickled::entry(std::string_view key) const {
  if (kind == Kind::dict)
    for (size_t i = 0; i < items.size(); i += 2)
      if (items[i]->kind == Kind::text && items[i]->text == key) return items[i + 1];
  return nullptr;
}

void Unpickler::refuse(const std::string& why) const { fail("could not read ", what_, ": ", why); }

void Unpickler::make(Kind kind, std::string text, std::vector<const Pickled*> items, int64_t integer) {
  values_.push_back({kind, integer, std::move(text), std::move(items)});
  stack_.push_back(&values_.back());
}

std::string_view Unpickler::take(size_t count) {
  if (count > rest_.size()) refuse("its pickle is cut off");
  const std::string_view bytes = rest_.substr(0, count);
  rest_.remove_prefix(count);
  return bytes;
}

uint64_t Unpickler::number(size_t bytes) {
  uint64_t value = 0;
  int shift = 0;
  for (const char byte : take(bytes)) {
    value |= uint64_t(static_cast<unsigned char>(byte)) << shift;
    shift += 8;
  }
  return value;
}

std::string_view Unpickler::line() {
  const size_t end = rest_.find('\n');
  if (end == std::string_view::npos) refuse("its pickle is cut off");
  const std::string_view word = take(end);
  take(1);
  return word;
}

Pickled& Unpickler::top() {
  if (stack_.empty() || (!marks_.empty() && stack_.size() <= marks_.back()))
    refuse("its pickle uses what it never made");
  return *stack_.back();
}

Pickled& Unpickler::pop() {
  Pickled& value = top();
  stack_.pop_back();
  return value;
}

std::vector<const Pickled*> Unpickler::pop_to_mark() {
  if (marks_.empty()) refuse("its pickle uses what it never made");
  const std::vector<const Pickled*> items(stack_.begin() + std::ptrdiff_t(marks_.back()), stack_.end());
  stack_.resize(marks_.back());
  marks_.pop_back();
  return items;
}

void Unpickler::push_function(const std::string& name) {
  if (name != "collections.OrderedDict" && !functions_.count(name))
    refuse("it holds an object of the kind " + name +
           ", which only Python can build. The weights alone can be read: torch.save(model.state_dict(), path)");
  make(Kind::function, name);
}

// The function and its tuple of arguments are on the stack.
void Unpickler::call() {
  const Pickled &arguments = pop(), &function = pop();
  if (function.kind != Kind::function || arguments.kind != Kind::sequence)
    refuse("its pickle calls what is no function");
  if (function.text != "collections.OrderedDict")
    make(Kind::call, function.text, {&arguments});
  else if (arguments.items.empty())
    make(Kind::dict);
  else
    refuse("its pickle makes a dictionary in a way that PyTorch does not");
}

void Unpickler::add_items(std::vector<const Pickled*> items, Kind kind) {
  Pickled& to = top();
  if (to.kind != kind || (kind == Kind::dict && items.size() % 2 != 0))
    refuse("its pickle puts items where they do not belong");
  to.items.insert(to.items.end(), items.begin(), items.end());
}

const Pickled& Unpickler::read(std::string_view& bytes) {
  rest_ = bytes;
  stack_.clear();
  marks_.clear();
  memo_.clear();
  outside_.clear();
  while (step(static_cast<unsigned char>(take(1)[0]))) {}
  bytes = rest_;
  return pop();
}

// Carries out an instruction; false: it was the last.
bool Unpickler::step(unsigned char instruction) {
  const auto remember = [&](size_t at) {
    // They are numbered as they come. A larger number would be a way to ask for much memory with few bytes.
    if (at > memo_.size()) refuse("its pickle leaves out numbers");
    if (at == memo_.size()) memo_.push_back(nullptr);
    memo_[at] = &top();
  };
  const auto recall = [&](size_t at) {
    if (at >= memo_.size()) refuse("its pickle uses what it never made");
    stack_.push_back(memo_[at]);
  };
  const auto tuple = [&](size_t count) {
    std::vector<const Pickled*> items(count);
    for (size_t i = count; i-- > 0;) items[i] = &pop();
    make(Kind::sequence, "", std::move(items));
  };
  const auto text = [&](size_t length) { make(Kind::text, std::string(take(length))); };
  const auto integer = [&](int64_t value) { make(Kind::integer, "", {}, value); };

  switch (instruction) {
    case 0x80:  // PROTO
      number(1);
      break;
    case 0x95:  // FRAME: the length of what follows, which needs no frame here
      number(8);
      break;
    case '.':  // STOP
      return false;

    case 'N':  // NONE
      make(Kind::none);
      break;
    case 0x88:  // NEWTRUE
    case 0x89:  // NEWFALSE
      integer(instruction == 0x88);
      break;
    case 'J':  // BININT, signed
      integer(int32_t(number(4)));
      break;
    case 'K':  // BININT1
      integer(int64_t(number(1)));
      break;
    case 'M':  // BININT2
      integer(int64_t(number(2)));
      break;
    case 0x8a: {  // LONG1: two's complement
      const size_t length = number(1);
      if (length > 8) {
        text(length);
        break;
      }
      const int unused = 64 - 8 * int(length);
      integer(length == 0 ? 0 : int64_t(number(length) << unused) >> unused);
      break;
    }
    case 'G':  // BINFLOAT
      number(8);
      make(Kind::none);
      break;
    case 'X':  // BINUNICODE
      text(number(4));
      break;
    case 0x8c:  // SHORT_BINUNICODE
    case 'U':   // SHORT_BINSTRING, Python 2's
      text(number(1));
      break;

    case '(':  // MARK
      marks_.push_back(stack_.size());
      break;
    case ')':  // EMPTY_TUPLE
    case ']':  // EMPTY_LIST
      make(Kind::sequence);
      break;
    case '}':  // EMPTY_DICT
      make(Kind::dict);
      break;
    case 't':  // TUPLE
      make(Kind::sequence, "", pop_to_mark());
      break;
    case 0x85:  // TUPLE1 to TUPLE3
    case 0x86:
    case 0x87:
      tuple(instruction - 0x84u);
      break;
    case 'a':  // APPEND
      add_items({&pop()}, Kind::sequence);
      break;
    case 'e':  // APPENDS
      add_items(pop_to_mark(), Kind::sequence);
      break;
    case 's': {  // SETITEM
      const Pickled &value = pop(), &key = pop();
      add_items({&key, &value}, Kind::dict);
      break;
    }
    case 'u':  // SETITEMS
      add_items(pop_to_mark(), Kind::dict);
      break;

    case 'q':  // BINPUT
      remember(number(1));
      break;
    case 'r':  // LONG_BINPUT
      remember(number(4));
      break;
    case 0x94:  // MEMOIZE
      remember(memo_.size());
      break;
    case 'h':  // BINGET
      recall(number(1));
      break;
    case 'j':  // LONG_BINGET
      recall(number(4));
      break;

    case 'c': {  // GLOBAL
      const std::string module(line());
      push_function(module + "." + std::string(line()));
      break;
    }
    case 0x93: {  // STACK_GLOBAL
      const Pickled &name = pop(), &module = pop();
      push_function(module.text + "." + name.text);
      break;
    }
    case 'R':  // REDUCE
      call();
      break;
    case 'b':  // BUILD: what an object has besides its items; a state dict has a note of its modules' versions
      pop();
      top();
      break;
    case 'Q':  // BINPERSID
      make(Kind::outside, "", {&pop()});
      outside_.push_back(&top());
      break;
    default:
      refuse("its pickle has an instruction, " + std::to_string(instruction) + ", that no state dict needs");
  }
  return true;
}
