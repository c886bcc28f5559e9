#include "tests/gateway/http_client.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace fathom {
namespace {

int receive_buffer_bytes = 0;  // 0: the system's

}  // namespace

void HttpClient::SetReceiveBuffer(int bytes) { receive_buffer_bytes = bytes; }

HttpClient::HttpClient(uint16_t port) {
  socket_ = socket(AF_INET, SOCK_STREAM, 0);
  CHECK_NE(socket_, -1);
  const timeval timeout{10, 0};
  setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  setsockopt(socket_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  if (receive_buffer_bytes > 0) {
    setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof(int));
  }
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  CHECK_EQ(connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
}

HttpClient::~HttpClient() { close(socket_); }

void HttpClient::Send(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return;  // the server hung up: what it said can still be read
    bytes.remove_prefix(sent);
  }
}

bool HttpClient::Fill() {
  char bytes[16384];
  const ssize_t received = recv(socket_, bytes, sizeof(bytes), 0);
  if (received <= 0) return false;
  buffer_.append(bytes, received);
  return true;
}

std::string HttpClient::TakeLine() {
  size_t end;
  while ((end = buffer_.find("\r\n")) == std::string::npos) {
    if (!Fill()) return std::exchange(buffer_, "");
  }
  std::string line = buffer_.substr(0, end);
  buffer_.erase(0, end + 2);
  return line;
}

std::string HttpClient::Take(size_t bytes) {
  while (buffer_.size() < bytes && Fill()) {
  }
  std::string taken = buffer_.substr(0, bytes);
  buffer_.erase(0, bytes);
  return taken;
}

HttpResponse HttpClient::ReadHead() {
  HttpResponse response;
  const std::string status_line = TakeLine();
  if (status_line.size() < 12) return response;
  response.status = std::atoi(status_line.c_str() + 9);
  while (true) {
    const std::string line = TakeLine();
    if (line.empty()) return response;
    const size_t colon = line.find(": ");
    CHECK(colon != std::string::npos) << line;
    std::string name = line.substr(0, colon);
    absl::AsciiStrToLower(&name);
    response.headers[name] = line.substr(colon + 2);
  }
}

std::optional<std::string> HttpClient::ReadChunk() {
  const size_t size = std::strtoul(TakeLine().c_str(), nullptr, 16);
  std::string chunk = Take(size);
  TakeLine();
  if (size == 0) return std::nullopt;
  return chunk;
}

HttpResponse HttpClient::Read() {
  HttpResponse response = ReadHead();
  if (response.headers.count("content-length") > 0) {
    response.body = Take(std::stoul(response.headers["content-length"]));
  } else if (response.headers.count("transfer-encoding") > 0) {
    while (std::optional<std::string> chunk = ReadChunk()) {
      response.body += *chunk;
      response.chunks.push_back(*std::move(chunk));
    }
  } else if (response.status != 0 && response.status != 100) {
    while (Fill()) {
    }
    response.body = std::exchange(buffer_, "");
  }
  return response;
}

bool HttpClient::ReadsEnd() {
  char byte;
  return buffer_.empty() && recv(socket_, &byte, 1, 0) == 0;
}

void HttpClient::CloseSending() { shutdown(socket_, SHUT_WR); }

void HttpClient::Abort() {
  const linger now{1, 0};
  setsockopt(socket_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  close(std::exchange(socket_, -1));
}

std::string Get(std::string_view path) {
  return absl::StrCat("GET ", std::string(path), " HTTP/1.1\r\nHost: test\r\n\r\n");
}

std::string Post(std::string_view path, std::string_view json) {
  return absl::StrCat("POST ", std::string(path),
                      " HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
                      "X-Request-Id: test\r\nContent-Length: ",
                      json.size(), "\r\n\r\n", std::string(json));
}

std::vector<std::string> EventsOf(const HttpResponse& response) {
  std::vector<std::string> events;
  std::string_view rest = response.body;
  while (!rest.empty()) {
    const size_t end = rest.find("\n\n");
    CHECK(rest.starts_with("data: ") && end != std::string_view::npos) << std::string(rest);
    events.emplace_back(rest.substr(6, end - 6));
    rest.remove_prefix(end + 2);
  }
  return events;
}

}  // namespace fathom
