package api

import (
	"encoding/base64"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// maxPage bounds the items of one page, whatever page_size says; nothing
	// is allocated by what a request asks for.
	maxPage = 5000
	// maxPageBytes keeps an answer below gRPC's default receive limit of 4 MiB.
	maxPageBytes = 3 << 20
	// pagePrefix versions the page tokens; clients treat them as opaque.
	pagePrefix = "p1:"
)

// pageToken makes the token of the page that starts after the given key.
func pageToken(after string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(pagePrefix + after))
}

// pageStart reads a page token back; the empty token is the first page.
func pageStart(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	text, err := base64.RawURLEncoding.DecodeString(token)
	after, ok := strings.CutPrefix(string(text), pagePrefix)
	if err != nil || !ok || after == "" {
		return "", fault.New(fault.Invalid, "page_token_invalid", "the page token is not one of ours: start again without it")
	}
	return after, nil
}

// pageSize clamps what a request asks for; zero lets the server choose.
func pageSize(asked int32) (int, error) {
	switch {
	case asked < 0:
		return 0, fault.New(fault.Invalid, "page_size_invalid", "a page size is zero or more")
	case asked == 0 || asked > maxPage:
		return maxPage, nil
	}
	return int(asked), nil
}

// fill takes items into a page while it stays below maxPageBytes; the first
// one is always taken. It returns how many fit.
func fill[M proto.Message](items []M) int {
	total := 0
	for i, m := range items {
		if total += proto.Size(m); total > maxPageBytes && i > 0 {
			return i
		}
	}
	return len(items)
}
