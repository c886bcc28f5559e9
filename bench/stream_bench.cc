// A closed loop of clients of simulated workers that knows every token: each one that comes is
// compared with the hash that it must be (worker/sim_token.h).
//
//   stream_bench --grpc unix:/run/…/coordinator.sock --streams 1024 --output-tokens 400
//   stream_bench --http 127.0.0.1:8000 --streams 1024 --process gateway=PID --process
//   coordinator=PID
//
// With --grpc the clients are streams of one GenerateMany call, as a gateway's are; with --http
// each has a connection and reads server-sent events. One thread either way, and little work per
// event, so that 1,024 streams at 50 tokens per second do not measure this program.
//
// Every client makes --rounds requests one after the other, with prompts of random tokens that no
// other one has. Reported are TTFT, the gaps between the events of a stream (ITL), and of the
// steady time the tokens per second, the steps delivered (tokens per stream), and their share of
// what steps of --ideal-step-ms would deliver. The steady time ends when the first client has made
// all its requests; with one round it begins when all have their first token, else when the last
// one has its first answer. --process adds the CPU time that a process spent from the first request
// to the last event, per million tokens.
//
// All clients begin at once, so that TTFT says how long all of them wait for each other. With
// --staggered the first answers are cut to different lengths: from then on requests come one at a
// time while all others stream, and TTFT is that of these.
//
// Exit code 1 when a token is wrong, or a request fails or is not complete.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "grpcpp/client_context.h"
#include "proto/endpoint.h"
#include "proto/generate.grpc.pb.h"
#include "worker/sim_token.h"

namespace fathom {
namespace {

using Clock = std::chrono::steady_clock;
using TokenIds = std::vector<uint32_t>;

struct Flags {
  std::string grpc;
  std::string http;
  int streams = 1024;
  int rounds = 1;
  int prompt_tokens = 16;
  int output_tokens = 400;
  int vocab_size = 129280;  // DeepSeek-V3's
  std::vector<int> eos_ids = {1};
  uint64_t seed = 0;
  double ideal_step_ms = 0;
  bool staggered = false;
  std::vector<std::string> processes;
  bool json = false;
};

double SecondsBetween(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

double Percentile(std::vector<double>& values, double percent) {
  if (values.empty()) return 0;
  const size_t at = std::min(
      values.size() - 1, static_cast<size_t>(percent / 100 * static_cast<double>(values.size())));
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(at), values.end());
  return values[at];
}

// CPU seconds of a process so far; 0 when it is gone.
double CpuSeconds(const std::string& pid) {
  std::ifstream file("/proc/" + pid + "/stat");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return 0;
  const std::vector<std::string> fields = absl::StrSplit(text.substr(name_end + 2), ' ');
  return static_cast<double>(std::atoll(fields[11].c_str()) + std::atoll(fields[12].c_str())) /
         static_cast<double>(sysconf(_SC_CLK_TCK));
}

// What the clients ask, and whether what they get is right.
class Clients {
 public:
  explicit Clients(const Flags& flags) : flags_(flags), clients_(flags.streams) {
    random_.seed(flags.seed);
  }

  // The prompt of a client's next request; empty when it has made all.
  TokenIds Begin(int index) {
    Client& client = clients_[index];
    if (client.rounds == flags_.rounds) return {};
    ++client.rounds;
    client.prefix = {};
    client.num_tokens = 0;
    client.began = Clock::now();
    TokenIds prompt;
    for (int i = 0; i < flags_.prompt_tokens; ++i) {
      prompt.push_back(static_cast<uint32_t>(random_() % flags_.vocab_size));
      client.prefix.Append(static_cast<int32_t>(prompt.back()));
    }
    ++num_running_;
    if (first_request_ == Clock::time_point()) first_request_ = client.began;
    return prompt;
  }

  // How many tokens a client's current request asks for.
  int OutputTokens(int index) const {
    if (!flags_.staggered || clients_[index].rounds > 1) return flags_.output_tokens;
    return 1 + static_cast<int>(int64_t{flags_.output_tokens - 1} * index / flags_.streams);
  }

  void OnTokens(int index, absl::Span<const uint32_t> token_ids, Clock::time_point now) {
    Client& client = clients_[index];
    for (const uint32_t token_id : token_ids) {
      const auto expected =
          static_cast<uint32_t>(client.prefix.NextToken(flags_.vocab_size, flags_.eos_ids));
      if (token_id != expected && ++num_wrong_ <= 10) {
        std::fprintf(stderr, "stream %d: token %d is %u, not %u\n", index, client.num_tokens,
                     token_id, expected);
      }
      client.prefix.Append(static_cast<int32_t>(expected));
      ++client.num_tokens;
    }
    num_tokens_ += static_cast<int64_t>(token_ids.size());
    ++num_events_;
    last_event_ = now;
    if (client.num_tokens == static_cast<int>(token_ids.size())) {
      const bool counts = !flags_.staggered || client.rounds > 1;
      if (counts) ttfts_.push_back(SecondsBetween(client.began, now) * 1e3);
      if (flags_.rounds == 1) CountReady();
    } else {
      itls_.push_back(SecondsBetween(client.last, now) * 1e3);
    }
    client.last = now;
  }

  // `error` is empty after an answer.
  void OnEnd(int index, const std::string& error) {
    Client& client = clients_[index];
    --num_running_;
    if (flags_.rounds > 1 && client.rounds == 1) CountReady();
    if (client.rounds == flags_.rounds && steady_from_.has_value() && !steady_until_.has_value()) {
      steady_until_ = {last_event_, num_tokens_};
    }
    if (error.empty() && client.num_tokens == OutputTokens(index)) return;
    if (++num_failed_ <= 10) {
      std::fprintf(stderr, "stream %d ended after %d tokens: %s\n", index, client.num_tokens,
                   error.empty() ? "it is not complete" : error.c_str());
    }
  }

  bool all_done() const { return num_running_ == 0; }

  // The exit code.
  int Report(const std::vector<std::pair<std::string, double>>& cpu_seconds) {
    const double seconds = SecondsBetween(first_request_, last_event_);
    std::vector<std::pair<std::string, double>> figures = {
        {"streams", flags_.streams},
        {"requests", flags_.streams * flags_.rounds},
        {"failed", num_failed_},
        {"tokens", num_tokens_},
        {"wrong_tokens", num_wrong_},
        {"tokens_per_event", static_cast<double>(num_tokens_) / std::max<double>(1, num_events_)},
        {"seconds", seconds},
        {"tokens_per_second", static_cast<double>(num_tokens_) / seconds},
        {"ttft_ms_p50", Percentile(ttfts_, 50)},
        {"ttft_ms_p99", Percentile(ttfts_, 99)},
        {"itl_ms_p50", Percentile(itls_, 50)},
        {"itl_ms_p99", Percentile(itls_, 99)}};
    if (steady_from_.has_value() && steady_until_.has_value()) {
      const double steady_seconds = SecondsBetween(steady_from_->time, steady_until_->time);
      const double steps =
          static_cast<double>(steady_until_->num_tokens - steady_from_->num_tokens) /
          flags_.streams;
      figures.emplace_back("steady_seconds", steady_seconds);
      figures.emplace_back("steady_tokens_per_second", steps * flags_.streams / steady_seconds);
      figures.emplace_back("steps_delivered", steps);
      figures.emplace_back("step_ms", steady_seconds * 1e3 / steps);
      if (flags_.ideal_step_ms > 0) {
        figures.emplace_back("share_of_ideal_percent",
                             100 * steps * flags_.ideal_step_ms * 1e-3 / steady_seconds);
      }
    }
    for (const auto& [name, cpu] : cpu_seconds) {
      figures.emplace_back(name + "_cpu_seconds_per_million_tokens",
                           cpu * 1e6 / static_cast<double>(num_tokens_));
    }
    Print(figures);
    return num_wrong_ == 0 && num_failed_ == 0 ? 0 : 1;
  }

 private:
  struct Client {
    SimPrefix prefix;
    int rounds = 0;
    int num_tokens = 0;
    Clock::time_point began, last;
  };
  struct Moment {
    Clock::time_point time;
    int64_t num_tokens = 0;
  };

  // A client has come as far as the steady time asks.
  void CountReady() {
    if (++num_ready_ == flags_.streams) steady_from_ = {last_event_, num_tokens_};
  }

  void Print(const std::vector<std::pair<std::string, double>>& figures) const {
    std::vector<std::string> words;
    for (const auto& [name, value] : figures) {
      words.push_back(flags_.json ? absl::StrCat("\"", name, "\": ", value)
                                  : absl::StrCat(name, " ", value));
    }
    const std::string text = absl::StrJoin(words, flags_.json ? ", " : "\n");
    std::printf(flags_.json ? "{%s}\n" : "%s\n", text.c_str());
  }

  const Flags& flags_;
  std::mt19937_64 random_;
  std::vector<Client> clients_;
  int num_running_ = 0;
  int num_ready_ = 0;
  int64_t num_tokens_ = 0;
  int64_t num_events_ = 0;
  int num_wrong_ = 0;
  int num_failed_ = 0;
  Clock::time_point first_request_, last_event_;
  std::optional<Moment> steady_from_, steady_until_;
  std::vector<double> ttfts_, itls_;
};

// All clients as streams of one GenerateMany call.
class GrpcStreams {
 public:
  GrpcStreams(const Flags& flags, v1::Generate::Stub& stub, Clients& clients)
      : flags_(flags), clients_(clients), call_(stub.GenerateMany(&context_)) {}

  void Run() {
    for (int i = 0; i < flags_.streams; ++i) Start(i);
    v1::GenerateEvents events;
    while (!clients_.all_done()) {
      if (!call_->Read(&events)) return Break();
      const Clock::time_point now = Clock::now();
      for (int i = 0; i < events.streams_size(); ++i) {
        const uint32_t token_id = events.token_ids(i);
        clients_.OnTokens(ClientOf(events.streams(i)), {&token_id, 1}, now);
      }
      for (const v1::StreamEvent& event : events.others()) Take(event, now);
    }
    call_->WritesDone();
    while (call_->Read(&events)) {
    }
    call_->Finish();
  }

 private:
  int ClientOf(uint64_t stream) const {
    return static_cast<int>(stream % static_cast<uint64_t>(flags_.streams));
  }

  void Start(int index) {
    const TokenIds prompt = clients_.Begin(index);
    if (prompt.empty()) return;
    v1::GenerateCommand command;
    command.set_stream(static_cast<uint64_t>(num_started_[index]++ * flags_.streams + index));
    v1::GenerateRequest& request = *command.mutable_start();
    request.mutable_prompt_token_ids()->Add(prompt.begin(), prompt.end());
    request.set_max_tokens(clients_.OutputTokens(index));
    request.set_ignore_eos(true);
    call_->Write(command);
  }

  void Take(const v1::StreamEvent& event, Clock::time_point now) {
    const int index = ClientOf(event.stream());
    const v1::GenerateResponse& response = event.response();
    if (response.token_ids_size() > 0) clients_.OnTokens(index, response.token_ids(), now);
    const bool is_finished = response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED;
    if (!is_finished && !event.has_failure()) return;
    clients_.OnEnd(index, event.has_failure() ? event.failure().message() : "");
    Start(index);
  }

  void Break() {
    const grpc::Status status = call_->Finish();
    clients_.OnEnd(0, absl::StrCat("the call ended: ", status.error_message()));
  }

  const Flags& flags_;
  Clients& clients_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::GenerateCommand, v1::GenerateEvents>> call_;
  std::vector<int64_t> num_started_ = std::vector<int64_t>(flags_.streams);
};

// Each client on a connection of its own to the gateway.
class HttpStreams {
 public:
  HttpStreams(const Flags& flags, Clients& clients)
      : flags_(flags), clients_(clients), connections_(flags.streams), epoll_(epoll_create1(0)) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(flags.http, ':');
    int port = 0;
    CHECK(absl::SimpleAtoi(parts.second, &port)) << "--http must be ADDRESS:PORT";
    address_.sin_family = AF_INET;
    address_.sin_port = htons(static_cast<uint16_t>(port));
    CHECK_EQ(inet_pton(AF_INET, parts.first.c_str(), &address_.sin_addr), 1)
        << "--http must be ADDRESS:PORT, with an IPv4 address";
  }
  ~HttpStreams() { close(epoll_); }

  void Run() {
    for (int i = 0; i < flags_.streams; ++i) Start(i);
    std::vector<epoll_event> events(256);
    while (!clients_.all_done()) {
      const int count = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), -1);
      for (int i = 0; i < count; ++i) Read(static_cast<int>(events[i].data.u32));
    }
  }

 private:
  struct Connection {
    int socket = -1;
    std::string unread;
  };

  void Start(int index) {
    const TokenIds prompt = clients_.Begin(index);
    if (prompt.empty()) return;
    const std::string body = absl::StrCat(
        R"({"stream":true,"return_token_ids":true,"ignore_eos":true,"temperature":0,"max_tokens":)",
        clients_.OutputTokens(index), R"(,"prompt":[)", absl::StrJoin(prompt, ","), "]}");
    const std::string request = absl::StrCat(
        "POST /v1/completions HTTP/1.1\r\nHost: ", flags_.http,
        "\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: ", body.size(),
        "\r\n\r\n", body);
    Connection& connection = connections_[index];
    connection.unread.clear();
    connection.socket = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connection.socket >= 0) << "no more sockets: raise ulimit -n";
    const int on = 1;
    setsockopt(connection.socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    const auto* address = reinterpret_cast<const sockaddr*>(&address_);
    const bool is_sent = connect(connection.socket, address, sizeof(address_)) == 0 &&
                         send(connection.socket, request.data(), request.size(), MSG_NOSIGNAL) ==
                             static_cast<ssize_t>(request.size());
    if (!is_sent) return End(index, "cannot send to the gateway");
    epoll_event event = {};
    event.events = EPOLLIN;
    event.data.u32 = static_cast<uint32_t>(index);
    CHECK_EQ(epoll_ctl(epoll_, EPOLL_CTL_ADD, connection.socket, &event), 0);
  }

  void Read(int index) {
    Connection& connection = connections_[index];
    const ssize_t size = recv(connection.socket, buffer_.data(), buffer_.size(), 0);
    if (size <= 0) return End(index, absl::StrCat("the connection broke: ", connection.unread));
    const Clock::time_point now = Clock::now();
    connection.unread.append(buffer_.data(), static_cast<size_t>(size));
    size_t begin = 0;
    for (size_t end; (end = connection.unread.find("\n\n", begin)) != std::string::npos;
         begin = end + 2) {
      const std::string_view event(connection.unread.data() + begin, end - begin);
      if (event.ends_with("data: [DONE]")) return End(index, "");
      if (event.find(R"("error":)") != std::string_view::npos) {
        return End(index, std::string(event));
      }
      TakeTokens(index, event, now);
    }
    connection.unread.erase(0, begin);
  }

  void TakeTokens(int index, std::string_view event, Clock::time_point now) {
    constexpr std::string_view kKey = R"("token_ids":[)";
    const size_t at = event.rfind(kKey);
    if (at == std::string_view::npos) return;
    token_ids_.clear();
    const char* next = event.data() + at + kKey.size();
    while (*next != ']') {
      char* end;
      token_ids_.push_back(static_cast<uint32_t>(std::strtoul(next, &end, 10)));
      next = *end == ',' ? end + 1 : end;
    }
    if (!token_ids_.empty()) clients_.OnTokens(index, token_ids_, now);
  }

  void End(int index, const std::string& error) {
    close(connections_[index].socket);
    clients_.OnEnd(index, error);
    Start(index);
  }

  const Flags& flags_;
  Clients& clients_;
  std::vector<Connection> connections_;
  const int epoll_;
  sockaddr_in address_ = {};
  std::vector<char> buffer_ = std::vector<char>(1 << 16);
  TokenIds token_ids_;
};

int Run(Flags& flags) {
  std::unique_ptr<v1::Generate::Stub> stub;
  if (!flags.grpc.empty()) {
    const auto channel = ConnectTo(flags.grpc, {});
    CHECK(channel.ok()) << channel.status();
    stub = v1::Generate::NewStub(*channel);
    grpc::ClientContext context;
    v1::ModelInfo model;
    const grpc::Status status = stub->GetModelInfo(&context, {}, &model);
    if (!status.ok()) {
      std::fprintf(stderr, "stream_bench: %s: %s\n", flags.grpc.c_str(),
                   status.error_message().c_str());
      return 1;
    }
    flags.vocab_size = static_cast<int>(model.vocab_size());
    flags.eos_ids.assign(model.eos_token_ids().begin(), model.eos_token_ids().end());
  }
  std::sort(flags.eos_ids.begin(), flags.eos_ids.end());

  std::vector<std::pair<std::string, std::string>> processes;  // name, process id
  for (const std::string& process : flags.processes) {
    processes.push_back(absl::StrSplit(process, absl::MaxSplits('=', 1)));
  }
  std::vector<std::pair<std::string, double>> cpu_seconds;
  for (const auto& [name, pid] : processes) cpu_seconds.emplace_back(name, -CpuSeconds(pid));
  Clients clients(flags);
  if (stub != nullptr) {
    GrpcStreams(flags, *stub, clients).Run();
  } else {
    HttpStreams(flags, clients).Run();
  }
  for (size_t i = 0; i < processes.size(); ++i) {
    cpu_seconds[i].second += CpuSeconds(processes[i].second);
  }
  return clients.Report(cpu_seconds);
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Clients of simulated workers that check every token.", "stream_bench");
  auto* where = app.add_option_group("where")->require_option(1);
  where->add_option("--grpc", flags.grpc, "the coordinator: unix:/path or host:port");
  where->add_option("--http", flags.http, "the gateway: ADDRESS:PORT, IPv4");
  app.option_defaults()->always_capture_default();
  app.add_option("--streams", flags.streams, "clients")->check(CLI::Range(1, 60000));
  auto* rounds =
      app.add_option("--rounds", flags.rounds, "requests of each")->check(CLI::PositiveNumber);
  app.add_option("--prompt-tokens", flags.prompt_tokens)->check(CLI::PositiveNumber);
  app.add_option("--output-tokens", flags.output_tokens)->check(CLI::PositiveNumber);
  app.add_option("--vocab-size", flags.vocab_size, "of the model; --grpc asks the coordinator")
      ->check(CLI::PositiveNumber);
  app.add_option("--eos-token-id", flags.eos_ids, "of the model; --grpc asks the coordinator");
  app.add_option("--seed", flags.seed, "of the prompts");
  app.add_option("--ideal-step-ms", flags.ideal_step_ms, "what a step of the workers takes");
  app.add_flag("--staggered", flags.staggered, "requests come one at a time; needs --rounds")
      ->needs(rounds);
  app.add_option("--process", flags.processes, "NAME=PID; several times");
  app.add_flag("--json", flags.json, "one object instead of lines");
  CLI11_PARSE(app, argc, argv);
  return Run(flags);
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
