// The response to one request: what its handler gives, as bytes on the connection.
//
// I/O thread only.
#pragma once

#include <chrono>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>

#include "gateway/http/client_socket.h"
#include "gateway/http/handler.h"
#include "gateway/http/response.h"
#include "gateway/http/task.h"

namespace fathom {

class Exchange : public ResponseWriter {
 public:
  struct Terms {
    std::chrono::milliseconds write_timeout{0};
    bool head_only = false;   // HEAD: the body is left out
    bool chunked = true;      // not understood by HTTP/1.0
    bool keep_alive = false;  // what the client would like
    std::string request_id;
    ResponseHeaders headers;  // of whatever is answered
  };

  // `socket` must outlive this.
  Exchange(ClientSocket& socket, Terms terms) : socket_(socket), terms_(std::move(terms)) {}

  Task<> Send(Response response) override;
  void SendEvent(std::string_view payload) override;
  void SendNamedEvents(std::string_view events) override;
  void EndEvents() override;
  bool is_behind() const override { return !unsent_.empty(); }
  Task<> CatchUp() override;
  bool gone() const override { return client_gone_ || cut_short_; }
  void SetOnGone(std::function<void()> on_gone) override;
  bool started() const override { return started_; }
  RequestNotes& notes() override { return notes_; }

  // The client is.
  void MarkGone();

  // Ends the response with that error, whole or as the last event of a stream; the handler sees the
  // client gone. Does nothing when it has ended already.
  void EndWith(const Response& error);

  void HandlerReturned() { on_gone_ = nullptr; }
  void CloseAfterwards() { terms_.keep_alive = false; }

  bool ended() const { return ended_; }
  bool client_gone() const { return client_gone_; }
  int status() const { return status_; }
  bool keeps_alive() const { return terms_.keep_alive && ended_ && !gone(); }

 private:
  Persistence persistence() const {
    return terms_.keep_alive ? Persistence::kKeepAlive : Persistence::kClose;
  }

  void NotifyGone();
  std::string HeadWith(const Response& response, const Framing& framing) const;
  std::string WholeResponse(const Response& response);
  // The head, if it is not out yet.
  std::string StartEvents();
  void AppendChunk(std::initializer_list<std::string_view> parts, std::string& bytes) const;
  void AppendEvent(std::string_view payload, std::string& bytes) const;
  void AppendEndOfEvents(std::string& bytes) const;
  // Now, or what the kernel does not take later.
  void Write(std::string_view bytes);

  ClientSocket& socket_;
  Terms terms_;
  RequestNotes notes_;
  std::function<void()> on_gone_;
  int status_ = 0;
  bool started_ = false;
  bool ended_ = false;
  bool catching_up_ = false;
  bool client_gone_ = false;
  bool events_have_names_ = false;
  bool cut_short_ = false;  // by EndWith
  std::string unsent_;      // what the kernel did not take, without what CatchUp is writing
};

}  // namespace fathom
