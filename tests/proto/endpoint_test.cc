#include "proto/endpoint.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

// A folder of its own, and sockets in it.
class EndpointTest : public ::testing::Test {
 protected:
  EndpointTest() {
    std::string pattern = ::testing::TempDir() + "/endpoint-XXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  ~EndpointTest() override { std::filesystem::remove_all(folder_); }

  std::string Path() const { return folder_ + "/socket"; }
  std::string Address() const { return "unix:" + Path(); }

  int Listen() const {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, Path().c_str(), sizeof(address.sun_path) - 1);
    const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    EXPECT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener, 1), 0);
    return listener;
  }

  std::string folder_;
};

TEST_F(EndpointTest, RefusesWhatIsNoAddress) {
  for (const char* address :
       {"", "here", ":80", "host:", "host:70000", "host:http", "host:-1", "unix:"}) {
    EXPECT_EQ(ConnectTo(address, {}).status().code(), absl::StatusCode::kInvalidArgument)
        << "'" << address << "'";
  }
  EXPECT_THAT(ConnectTo("unix:/" + std::string(200, 'x'), {}).status().message(),
              HasSubstr("has 201 bytes, expected 1 to 107"));
}

TEST_F(EndpointTest, SpeaksInTheClearOnlyWithinTheHostOrWhenTold) {
  for (const char* address : {"unix:/tmp/x", "localhost:1", "127.0.0.1:1", "[::1]:1"}) {
    EXPECT_TRUE(ServerCredentialsFor(address, {}).ok()) << address;
  }
  TlsOptions insecure;
  insecure.allow_insecure_tcp = true;
  for (const char* address : {"0.0.0.0:1", "10.1.2.3:1", "worker3:1", "[::]:1"}) {
    EXPECT_THAT(ServerCredentialsFor(address, {}).status().message(), HasSubstr("--insecure"));
    EXPECT_TRUE(ServerCredentialsFor(address, insecure).ok()) << address;
  }
}

TEST_F(EndpointTest, NamesTheTlsFileThatCannotBeRead) {
  const TlsOptions tls = {.certificate_file = "/nowhere/certificate",
                          .private_key_file = "/nowhere/key",
                          .authority_file = "/nowhere/authority"};
  EXPECT_THAT(ConnectTo("worker3:1", tls).status().message(), HasSubstr("/nowhere/authority"));
}

TEST_F(EndpointTest, RemovesTheSocketOfADeadProcess) {
  close(Listen());
  ASSERT_TRUE(std::filesystem::exists(Path()));
  EXPECT_TRUE(PrepareToListen(Address()).ok());
  EXPECT_FALSE(std::filesystem::exists(Path()));
}

TEST_F(EndpointTest, DoesNotTakeTheSocketOfALivingOne) {
  const int listener = Listen();
  EXPECT_EQ(PrepareToListen(Address()).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(std::filesystem::exists(Path()));
  close(listener);
}

TEST_F(EndpointTest, DoesNotRemoveAFileThatIsNoSocket) {
  std::ofstream(Path()) << "precious";
  EXPECT_THAT(PrepareToListen(Address()).message(), HasSubstr("is not a socket"));
  EXPECT_TRUE(std::filesystem::exists(Path()));
}

TEST_F(EndpointTest, HasNothingToPrepareForTcpOrANewSocket) {
  EXPECT_TRUE(PrepareToListen("127.0.0.1:50051").ok());
  EXPECT_TRUE(PrepareToListen(Address()).ok());
}

}  // namespace
}  // namespace fathom
