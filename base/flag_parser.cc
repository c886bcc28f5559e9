#include "base/flag_parser.h"

#include <sysexits.h>

#include <cstdint>
#include <cstdio>

#include "CLI/CLI.hpp"

namespace fathom {

Flag Flag::Required() {
  option_->required();
  return *this;
}

template <typename T>
Flag Flag::Between(T low, T high) {
  option_->check(CLI::Range(low, high));
  return *this;
}

Flag Flag::OneOf(const std::vector<std::string>& values) {
  option_->check(CLI::IsMember(values));
  return *this;
}

Flag Flag::OneOf(std::initializer_list<int> values) {
  option_->check(CLI::IsMember(values));
  return *this;
}

Flag Flag::NotEmpty() {
  option_->check([](const std::string& value) { return value.empty() ? "must not be empty" : ""; });
  return *this;
}

Flag Flag::ExistingDirectory() {
  option_->check(CLI::ExistingDirectory);
  return *this;
}

Flag Flag::SplitAtCommas() {
  option_->delimiter(',');
  return *this;
}

Flag Flag::Repeatable() {
  option_->expected(1, 1)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  return *this;
}

Flag Flag::LastCounts() {
  option_->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  return *this;
}

Flag Flag::FromEnvironment(const std::string& variable) {
  option_->envname(variable);
  return *this;
}

Flag Flag::Needs(const Flag& other) {
  option_->needs(other.option_);
  return *this;
}

Flag Flag::ShowDefault() {
  option_->capture_default_str();
  return *this;
}

Flag Flag::InGroup(const std::string& group) {
  option_->group(group);
  return *this;
}

FlagParser::FlagParser(const std::string& description, const std::string& program)
    : app_(std::make_unique<CLI::App>(description, program)) {}

FlagParser::~FlagParser() = default;

template <typename T>
Flag FlagParser::Add(const std::string& name, T& value, const std::string& help) {
  return Flag(app_->add_option(name, value, help));
}

Flag FlagParser::AddSeconds(const std::string& name, std::chrono::milliseconds& value,
                            const std::string& help) {
  const auto set = [&value](const double& seconds) {
    value = std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
  };
  CLI::Option* const option = app_->add_option_function<double>(name, set, help);
  option->default_str(std::to_string(value.count() / 1000));
  return Flag(option);
}

Flag FlagParser::AddSwitch(const std::string& name, bool& value, const std::string& help) {
  return Flag(app_->add_flag(name, value, help));
}

void FlagParser::AddVersion(const std::string& version) {
  app_->set_version_flag("--version", version);
}

void FlagParser::ShowDefaults() { app_->option_defaults()->always_capture_default(); }

std::optional<int> FlagParser::Parse(int argc, char** argv) {
  try {  // CLI11 throws; this is the one place where it is caught
    app_->parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app_->exit(error);  // --help, --version
    std::fprintf(stderr, "%s (see %s --help)\n", error.what(), app_->get_name().c_str());
    return EX_USAGE;
  }
  return std::nullopt;
}

template Flag Flag::Between(int, int);
template Flag Flag::Between(int64_t, int64_t);
template Flag Flag::Between(size_t, size_t);
template Flag Flag::Between(double, double);

template Flag FlagParser::Add(const std::string&, std::string&, const std::string&);
template Flag FlagParser::Add(const std::string&, int&, const std::string&);
template Flag FlagParser::Add(const std::string&, int64_t&, const std::string&);
template Flag FlagParser::Add(const std::string&, uint16_t&, const std::string&);
template Flag FlagParser::Add(const std::string&, uint32_t&, const std::string&);
template Flag FlagParser::Add(const std::string&, uint64_t&, const std::string&);
template Flag FlagParser::Add(const std::string&, double&, const std::string&);
template Flag FlagParser::Add(const std::string&, std::vector<std::string>&, const std::string&);
template Flag FlagParser::Add(const std::string&, std::vector<int>&, const std::string&);
template Flag FlagParser::Add(const std::string&, std::vector<double>&, const std::string&);

}  // namespace fathom
