// Package rpc builds every gRPC server of Assay, and the TLS of its clients, so
// that one set of rules holds on every socket:
//
//  1. The transport establishes who is calling: a local peer by its kernel
//     credentials, a remote one by its X.509-SVID (valid, expired or none).
//  2. Before any body is read, the tap handle demands the required header,
//     looks the method up in the server's one method table and asks its rule.
//     A method that is not in the table is refused (I11).
//  3. The handler runs. What it returns is mapped to a status from kind and
//     safe text alone, logged once with its cause, and counted.
//
// Handlers return faults. They never return a context's error: a client that
// receives Canceled stops for good (checklist WL-24), so a cancelled handler
// is answered with Unavailable.
package rpc
