// The flags of a program: declared one by one, parsed once, put where the program wants them.
//
// On top of CLI11, whose templates take a compiler many seconds in each file that includes them: so
// only flag_parser.cc does. How a command line is read, --help and what is said of bad values are
// CLI11's. Not thread-safe.
#pragma once

#include <chrono>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace fathom {

// One flag; each call says more of it.
class Flag {
 public:
  explicit Flag(CLI::Option* option) : option_(option) {}

  Flag Required();
  // [low, high]; T is int, int64_t, size_t or double.
  template <typename T>
  Flag Between(T low, T high);
  Flag OneOf(const std::vector<std::string>& values);
  Flag OneOf(std::initializer_list<int> values);
  Flag NotEmpty();
  Flag ExistingDirectory();
  // A list may be one value with commas.
  Flag SplitAtCommas();
  // A list with one value for each time that the flag is given.
  Flag Repeatable();
  // Of several values, for a flag that is no list. Else they are refused.
  Flag LastCounts();
  Flag FromEnvironment(const std::string& variable);
  Flag Needs(const Flag& other);
  // For --help.
  Flag ShowDefault();
  Flag InGroup(const std::string& group);

 private:
  CLI::Option* option_;
};

class FlagParser {
 public:
  // `program` is the name in messages.
  FlagParser(const std::string& description, const std::string& program);
  ~FlagParser();

  // A flag that sets `value`, which must outlive this: a string, a number, or a vector of those
  // (see the end of flag_parser.cc).
  template <typename T>
  Flag Add(const std::string& name, T& value, const std::string& help = "");
  // The same in seconds, with a fraction.
  Flag AddSeconds(const std::string& name, std::chrono::milliseconds& value,
                  const std::string& help);
  // A flag without a value. "--a,!--no-a" has a second name that sets it to false.
  Flag AddSwitch(const std::string& name, bool& value, const std::string& help = "");
  void AddVersion(const std::string& version);
  // Of all flags that are added later.
  void ShowDefaults();

  // Nothing, or the code to exit with: 0 after --help and --version, EX_USAGE after a line on
  // stderr that says what was wrong.
  std::optional<int> Parse(int argc, char** argv);

 private:
  const std::unique_ptr<CLI::App> app_;
};

}  // namespace fathom
