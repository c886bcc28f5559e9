// A closed loop of clients of simulated workers that knows every token: each one that comes is
// compared with the hash that it must be (worker/sim_token.h).
//
//   stream_bench --grpc unix:/run/…/coordinator.sock --streams 1024 --output-tokens 400
//   stream_bench --http 127.0.0.1:8000 --streams 1024 --process gateway=PID
//
// With --grpc the clients are streams of one GenerateMany call, as a gateway's are; with --http
// each has a connection and reads server-sent events. One thread either way, and little work per
// event, so that 1,024 streams at 50 tokens per second do not measure this program. With both they
// take turns, --repeat times, and what the gateway adds is reported. With --slow-clients a further
// run has as many clients beside it that send and read nothing (slow_clients.h), and what they
// change is reported.
//
// Every client makes --rounds requests one after the other, with prompts of random tokens that no
// other one has. Reported are TTFT, the gaps between the events of a stream (ITL), and of the
// steady time the tokens per second, the steps delivered (tokens per stream), and their share of
// what steps of --ideal-step-ms would deliver. The steady time ends when the first client has made
// all its requests; with one round it begins when all have their first token, else when the last
// one has its first answer. The CPU time of a run is that from before the first request to the last
// event: of this program, and of each --process.
//
// All clients begin at once, so that TTFT says how long all of them wait for each other. With
// --staggered the first answers are cut to different lengths: from then on requests come one at a
// time while all others stream, and TTFT and ITL are those of the steady time, for which it takes
// three rounds. Who asks as soon as an answer has ended always does so at the same moment of a
// step, which hides whatever delays a request by less than the rest of the step: with --pause-ms it
// waits before, for a random time of at most that.
//
// Exit code 1 when a token is wrong, or a request fails or is not complete; without figures when
// none is complete.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "bench/sim_clients.h"
#include "bench/slow_clients.h"
#include "bench/starter.h"
#include "grpcpp/client_context.h"
#include "proto/endpoint.h"
#include "proto/generate.grpc.pb.h"

namespace fathom {
namespace {

using Clock = SimClients::Clock;
using TokenIds = SimClients::TokenIds;

struct Flags {
  std::string grpc;
  std::string http;
  int slow_clients = 0;
  int repeat = 1;
  std::vector<std::string> processes;
  bool json = false;
};

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

// The most memory that a process ever had; 0 when it is gone.
double PeakMegabytes(const std::string& pid) {
  std::ifstream file("/proc/" + pid + "/status");
  for (std::string line; std::getline(file, line);) {
    if (absl::StartsWith(line, "VmHWM:")) return std::atof(line.c_str() + 6) / 1024;
  }
  return 0;
}

sockaddr_in AddressOf(const std::string& text) {
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, ':');
  sockaddr_in address = {};
  int port = 0;
  CHECK(absl::SimpleAtoi(parts.second, &port) &&
        inet_pton(AF_INET, parts.first.c_str(), &address.sin_addr) == 1)
      << "--http must be ADDRESS:PORT, with an IPv4 address";
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

double FigureOf(const Figures& figures, std::string_view name) {
  const auto found = absl::c_find_if(figures, [&](const auto& pair) { return pair.first == name; });
  CHECK(found != figures.end());
  return found->second;
}

double Median(std::vector<double> values) {
  absl::c_sort(values);
  return values[values.size() / 2];
}

// All clients as streams of one GenerateMany call.
class GrpcStreams {
 public:
  GrpcStreams(int streams, v1::Generate::Stub& stub, SimClients& clients)
      : streams_(streams), clients_(clients), call_(stub.GenerateMany(&context_)) {}

  void Run() {
    {
      const std::lock_guard lock(mutex_);
      for (int i = 0; i < streams_; ++i) starter_->StartAt(Clock::now(), i);
    }
    v1::GenerateEvents events;
    while (!all_done()) {
      if (!call_->Read(&events)) return Break();
      const Clock::time_point now = Clock::now();
      const std::lock_guard lock(mutex_);
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
  bool all_done() {
    const std::lock_guard lock(mutex_);
    return clients_.all_done();
  }

  int ClientOf(uint64_t stream) const {
    return static_cast<int>(stream % static_cast<uint64_t>(streams_));
  }

  void Start(int index) {
    const TokenIds prompt = clients_.Begin(index);
    if (prompt.empty()) return;
    v1::GenerateCommand command;
    command.set_stream(static_cast<uint64_t>(num_started_[index]++ * streams_ + index));
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
    starter_->StartAt(clients_.NextRequestAt(), index);
  }

  void Break() {
    starter_ = std::nullopt;
    const grpc::Status status = call_->Finish();
    clients_.OnEnd(0, absl::StrCat("the call ended: ", status.error_message()));
  }

  const int streams_;
  SimClients& clients_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::GenerateCommand, v1::GenerateEvents>> call_;
  std::vector<int64_t> num_started_ = std::vector<int64_t>(streams_);
  std::mutex mutex_;  // of all that is not gRPC's
  std::optional<Starter> starter_{std::in_place, mutex_, [this](int index) { Start(index); }};
};

// Each client on a connection of its own to the gateway.
//
// On a machine that it shares with the server it must not cost more than it has to: events are not
// acknowledged one by one, and gather for kNap before they are read.
class HttpStreams {
 public:
  HttpStreams(int streams, const sockaddr_in& address, SimClients& clients)
      : clients_(clients), connections_(streams), epoll_(epoll_create1(0)), address_(address) {}
  ~HttpStreams() { close(epoll_); }

  void Run() {
    std::unique_lock lock(mutex_);
    for (size_t i = 0; i < connections_.size(); ++i) {
      starter_.StartAt(Clock::now(), static_cast<int>(i));
    }
    std::vector<epoll_event> events(256);
    while (!clients_.all_done()) {
      lock.unlock();
      std::this_thread::sleep_for(kNap);
      const int count =
          epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), kLookAgainMs);
      lock.lock();
      for (int i = 0; i < count; ++i) Read(static_cast<int>(events[i].data.u32));
    }
  }

 private:
  static constexpr std::chrono::microseconds kNap{100};
  static constexpr int kLookAgainMs =
      100;  // whether all is done: the last request may not have begun

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
        "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: "
        "application/json\r\nConnection: close\r\nContent-Length: ",
        body.size(), "\r\n\r\n", body);
    Connection& connection = connections_[index];
    connection.unread.clear();
    connection.socket = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connection.socket >= 0) << "no more sockets: raise ulimit -n";
    const int on = 1;
    setsockopt(connection.socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    const int off = 0;
    setsockopt(connection.socket, IPPROTO_TCP, TCP_QUICKACK, &off, sizeof(off));
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
    starter_.StartAt(clients_.NextRequestAt(), index);
  }

  SimClients& clients_;
  std::vector<Connection> connections_;
  const int epoll_;
  const sockaddr_in address_;
  std::vector<char> buffer_ = std::vector<char>(1 << 16);
  TokenIds token_ids_;
  std::mutex mutex_;  // of all of this
  Starter starter_{mutex_, [this](int index) { Start(index); }};
};

// Runs the same clients in one or several ways, in turn.
class Bench {
 public:
  Bench(const Flags& flags, SimClientsOptions options)
      : flags_(flags), options_(std::move(options)) {}

  // The exit code.
  int Run() {
    if (!flags_.grpc.empty() && !AskCoordinator()) return 1;
    if (!flags_.http.empty()) address_ = AddressOf(flags_.http);
    absl::c_sort(options_.eos_ids);
    for (int i = 0; i < flags_.repeat; ++i) {
      const auto run_grpc = [&](SimClients& clients) {
        GrpcStreams(options_.streams, *stub_, clients).Run();
      };
      if (stub_ != nullptr && !Measure("grpc", run_grpc, grpc_)) return 1;
      const auto run_http = [&](SimClients& clients) {
        HttpStreams(options_.streams, address_, clients).Run();
      };
      if (!flags_.http.empty() && !Measure("http", run_http, http_)) return 1;
      if (flags_.slow_clients == 0) continue;
      const SlowClients slow_clients(address_, flags_.slow_clients);
      if (!Measure("http beside slow clients", run_http, beside_slow_)) return 1;
    }
    Compare();
    return all_right_ ? 0 : 1;
  }

 private:
  // Of which model it is. False when it does not answer.
  bool AskCoordinator() {
    const auto channel = ConnectTo(flags_.grpc, {});
    CHECK(channel.ok()) << channel.status();
    stub_ = v1::Generate::NewStub(*channel);
    grpc::ClientContext context;
    v1::ModelInfo model;
    const grpc::Status status = stub_->GetModelInfo(&context, {}, &model);
    if (!status.ok()) {
      std::fprintf(stderr, "stream_bench: %s: %s\n", flags_.grpc.c_str(),
                   status.error_message().c_str());
      return false;
    }
    options_.vocab_size = static_cast<int>(model.vocab_size());
    options_.eos_ids.assign(model.eos_token_ids().begin(), model.eos_token_ids().end());
    return true;
  }

  // Adds the figures of a run to `measured`. False when there is nothing to measure.
  bool Measure(const std::string& way, const std::function<void(SimClients&)>& run,
               std::vector<Figures>& measured) {
    std::vector<std::pair<std::string, std::string>> processes = {{"clients", "self"}};
    for (const std::string& process : flags_.processes) {
      processes.push_back(absl::StrSplit(process, absl::MaxSplits('=', 1)));
    }
    std::vector<double> cpu_seconds;
    for (const auto& [name, pid] : processes) cpu_seconds.push_back(-CpuSeconds(pid));
    SimClients clients(options_);
    ++options_.seed;  // of the next run
    run(clients);
    if (clients.num_answered() == 0) {
      std::fprintf(stderr,
                   "stream_bench: %s: none of %d requests was answered; the lines above say why "
                   "(is it a server of simulated workers, with this --vocab-size?)\n",
                   way.c_str(), options_.streams * options_.rounds);
      return false;
    }
    Figures figures = clients.Measure();
    for (size_t i = 0; i < processes.size(); ++i) {
      const auto& [name, pid] = processes[i];
      cpu_seconds[i] += CpuSeconds(pid);
      figures.emplace_back(name + "_cpu_seconds_per_million_tokens",
                           cpu_seconds[i] * 1e6 / static_cast<double>(clients.num_tokens()));
      if (pid != "self") figures.emplace_back(name + "_peak_mb", PeakMegabytes(pid));
    }
    all_right_ = all_right_ && clients.all_right();
    Print(way, figures);
    measured.push_back(std::move(figures));
    return true;
  }

  // Medians over the turns of what a way changes within a turn.
  void Compare() {
    Figures figures;
    for (const char* name : {"ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99"}) {
      std::vector<double> added, changes;
      for (int i = 0; i < flags_.repeat; ++i) {
        if (!grpc_.empty() && !http_.empty()) {
          added.push_back(FigureOf(http_[i], name) - FigureOf(grpc_[i], name));
        }
        if (!beside_slow_.empty()) {
          changes.push_back(100 * (FigureOf(beside_slow_[i], name) / FigureOf(http_[i], name) - 1));
        }
      }
      if (!added.empty()) figures.emplace_back(absl::StrCat("added_", name), Median(added));
      if (!changes.empty()) {
        figures.emplace_back(absl::StrCat("slow_clients_change_", name, "_percent"),
                             Median(changes));
      }
    }
    if (!figures.empty()) Print("compared", figures);
  }

  void Print(const std::string& way, const Figures& figures) const {
    std::vector<std::string> words;
    for (const auto& [name, value] : figures) {
      if (!std::isfinite(value)) continue;  // of too few answers
      words.push_back(flags_.json ? absl::StrCat("\"", name, "\": ", value)
                                  : absl::StrCat(name, " ", value));
    }
    if (flags_.json) {
      std::printf("{\"clients\": \"%s\", %s}\n", way.c_str(), absl::StrJoin(words, ", ").c_str());
    } else {
      std::printf("%s\n  %s\n", way.c_str(), absl::StrJoin(words, "\n  ").c_str());
    }
    std::fflush(stdout);
  }

  const Flags& flags_;
  SimClientsOptions options_;
  std::unique_ptr<v1::Generate::Stub> stub_;
  sockaddr_in address_ = {};
  std::vector<Figures> grpc_, http_, beside_slow_;  // of each turn
  bool all_right_ = true;
};

int Main(int argc, char** argv) {
  Flags flags;
  SimClientsOptions options;
  CLI::App app("Clients of simulated workers that check every token.", "stream_bench");
  auto* where = app.add_option_group("where")->require_option(1, 2);
  where->add_option("--grpc", flags.grpc, "the coordinator: unix:/path or host:port");
  auto* http = where->add_option("--http", flags.http, "the gateway: ADDRESS:PORT, IPv4");
  app.option_defaults()->always_capture_default();
  app.add_option("--streams", options.streams, "clients")->check(CLI::Range(1, 60000));
  auto* rounds =
      app.add_option("--rounds", options.rounds, "requests of each")->check(CLI::PositiveNumber);
  app.add_option("--prompt-tokens", options.prompt_tokens)->check(CLI::PositiveNumber);
  app.add_option("--output-tokens", options.output_tokens)->check(CLI::PositiveNumber);
  app.add_option("--vocab-size", options.vocab_size, "of the model; --grpc asks the coordinator")
      ->check(CLI::PositiveNumber);
  app.add_option("--eos-token-id", options.eos_ids, "of the model; --grpc asks the coordinator");
  app.add_option("--seed", options.seed, "of the prompts; the next run's is one more");
  app.add_option("--ideal-step-ms", options.ideal_step_ms, "what a step of the workers takes");
  app.add_flag("--staggered", options.staggered, "requests come one at a time; needs --rounds 3")
      ->needs(rounds);
  app.add_option("--pause-ms", options.pause_ms, "before another request of a client, at most")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--slow-clients", flags.slow_clients, "of a further run; needs --http")
      ->check(CLI::Range(1, 60000))
      ->needs(http);
  app.add_option("--repeat", flags.repeat, "turns of all ways")->check(CLI::PositiveNumber);
  app.add_option("--process", flags.processes, "NAME=PID; several times");
  app.add_flag("--json", flags.json, "an object a line for each run");
  CLI11_PARSE(app, argc, argv);
  return Bench(flags, std::move(options)).Run();
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
