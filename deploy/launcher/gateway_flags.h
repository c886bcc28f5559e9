// The flags of `fathom serve` that are the gateway's own and go on to it: limits, keys,
// certificate.
#pragma once

#include "deploy/launcher/serve_options.h"

namespace CLI {
class App;
}

namespace fathom {

// What is given ends up in `options`, which must live as long as `app`.
void AddGatewayFlags(CLI::App& app, ServeOptions& options);

}  // namespace fathom
