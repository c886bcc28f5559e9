// The events of a stream whose events have names.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tests/gateway/http_client.h"

namespace fathom {

using NamedEvents = std::vector<std::pair<std::string, std::string>>;  // names and data

// Expects whole events with names and nothing else, each chunk one or more of them.
NamedEvents EventsWithNames(const HttpResponse& response);

// Expects that each event's data begins with its name as `type`.
std::vector<std::string> NamesOf(const NamedEvents& events);

}  // namespace fathom
