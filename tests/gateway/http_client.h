// A client that writes what it is told to a real socket, right or wrong, and reads what comes back.
// Everything gives up after ten seconds.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fathom {

struct HttpResponse {
  int status = 0;                              // 0: the connection closed before there was one
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
  std::vector<std::string> chunks;             // of a chunked body
};

class HttpClient {
 public:
  explicit HttpClient(uint16_t port);
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  void Send(std::string_view bytes);
  HttpResponse Read();
  // To a HEAD request: no body follows.
  HttpResponse ReadHead();
  // The next chunk of a chunked body whose head ReadHead has read; nullopt at its end.
  std::optional<std::string> ReadChunk();

  // The other side has closed, and nothing more was to be read.
  bool ReadsEnd();

  void CloseSending();
  // At once, with a reset.
  void Abort();
  // Makes the kernel take little before this client reads.
  static void SetReceiveBuffer(int bytes);

 private:
  bool Fill();  // reads some; false at the end
  std::string TakeLine();
  std::string Take(size_t bytes);

  int socket_ = -1;
  std::string buffer_;
};

std::string Get(std::string_view path);
// With an X-Request-Id, so that ids are known.
std::string Post(std::string_view path, std::string_view json);

// The payloads of `data:` events.
std::vector<std::string> EventsOf(const HttpResponse& response);

}  // namespace fathom
