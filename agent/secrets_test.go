package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// shows says in which form content has a secret, or nothing.
func shows(content, secret []byte) string {
	forms := map[string][]byte{
		"as it is": secret, "in hex": []byte(hex.EncodeToString(secret)), "in HEX": []byte(strings.ToUpper(hex.EncodeToString(secret))),
		"quoted": []byte(strings.Trim(strconv.Quote(string(secret)), `"`)), "as numbers": []byte(strings.Trim(fmt.Sprint(secret), "[]")),
	}
	// Inside of something longer, base64 begins at any of three places.
	for skip := range 3 {
		whole := secret[skip:]
		whole = whole[:len(whole)/3*3]
		forms[fmt.Sprint("in base64 from byte ", skip)] = []byte(base64.StdEncoding.EncodeToString(whole))
		forms[fmt.Sprint("in base64url from byte ", skip)] = []byte(base64.URLEncoding.EncodeToString(whole))
	}
	for form, needle := range forms {
		if bytes.Contains(content, needle) {
			return form
		}
	}
	return ""
}

// files returns what the files below dir hold.
func files(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			found[filepath.Base(path)], err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// rejectSecret fetches the workload's key by SDS and rejects it with a text that
// gives it away. It asks for what is not there, too, and tells of the errors.
func rejectSecret(t *testing.T, m *machine, told io.Writer) (keyPEM []byte) {
	t.Helper()
	cc := must(grpc.NewClient("unix://"+filepath.Join(m.cfg.Sockets.Dir, "sds.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer func() { _ = cc.Close() }()
	stream := must(secretv3.NewSecretDiscoveryServiceClient(cc).StreamSecrets(t.Context()))
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}}); err != nil {
		t.Fatal(err)
	}
	resp := must(stream.Recv())
	secret := &tlsv3.Secret{}
	if err := resp.GetResources()[0].UnmarshalTo(secret); err != nil {
		t.Fatal(err)
	}
	keyPEM = secret.GetTlsCertificate().GetPrivateKey().GetInlineBytes()
	if err := stream.Send(&discoveryv3.DiscoveryRequest{
		ResourceNames: []string{"default"}, ResponseNonce: resp.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "can't load " + string(keyPEM)},
	}); err != nil {
		t.Fatal(err)
	}
	m.awaitLog("a client of SDS rejected")
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"file-root:system"}, ResponseNonce: resp.GetNonce()}); err != nil {
		t.Fatal(err)
	}
	_, err := stream.Recv()
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("unknown name: %v", err)
	}
	fmt.Fprintf(told, "%v %+v\n", err, err)
	return keyPEM
}

// I10: joining, being refused, serving, an outage, a restart and a ban leave no
// token and no key anywhere but the agent's own in identity.json.
func TestSecretsOfTheAgentAreNowhere(t *testing.T) {
	const token, wrong = "the-CANARY-token-0123456789", "wrong-CANARY-token-987654321"
	f := newFake(t, mine("web"))
	f.token = token
	f.start(t)
	m := newMachine(t, f)
	m.level = slog.LevelDebug
	secrets, told := map[string][]byte{"the token": []byte(token), "a wrong token": []byte(wrong)}, &bytes.Buffer{}
	writeToken := func(text string) {
		if err := os.WriteFile(m.cfg.JoinTokenFile, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keep := func(name string, key *ecdsa.PrivateKey) {
		secrets[name], secrets[name+" in PKCS#8"] = must(key.Bytes()), must(x509.MarshalPKCS8PrivateKey(key))
	}
	places := map[string][]byte{}
	look := func(when string) {
		for name, content := range files(t, m.cfg.DataDir) {
			places[when+" "+name] = content
		}
		for name, content := range files(t, m.cfg.RunDir) {
			places[when+" "+name] = content
		}
		for _, family := range must(m.reg.Gather()) {
			places["metrics"] = append(places["metrics"], family.String()...)
		}
	}

	writeToken(wrong)
	m.start()
	m.awaitLog("join_token_invalid")
	fmt.Fprintln(told, m.agent.Ready(context.Background()))
	writeToken(token)
	m.awaitReady()
	fetch := func(name string) {
		svid, err := m.fetch()
		if err != nil {
			t.Fatal(err)
		}
		keep(name, svid.PrivateKey.(*ecdsa.PrivateKey))
	}
	fetch("the workload's key")
	for n, line := range bytes.Split(rejectSecret(t, m, told), []byte("\n")) {
		if len(line) == 64 {
			secrets[fmt.Sprint("the workload's key in PEM, line ", n)] = line
		}
	}
	sealed := filepath.Join(m.cfg.RunDir, "svids.sealed")
	eventually(t, "the sealed file", func() error { _, err := os.Stat(sealed); return err })
	var identity struct{ Key []byte }
	own := must(os.ReadFile(filepath.Join(m.cfg.DataDir, "identity.json")))
	if err := json.Unmarshal(own, &identity); err != nil {
		t.Fatal(err)
	}
	keep("the agent's key", must(x509.ParsePKCS8PrivateKey(identity.Key)).(*ecdsa.PrivateKey))
	if shows(own, secrets["the agent's key"]) == "" || shows([]byte("x"+token), []byte(token)) == "" {
		t.Fatal("the test would see nothing")
	}
	look("while serving")

	f.stop()
	m.awaitLog("lost the server's stream")
	fmt.Fprintln(told, m.stop())
	look("stopped")
	m.start()
	m.awaitReady()
	fetch("the workload's key after the restart")
	f.ban()
	f.start(t)
	select {
	case <-m.done:
	case <-time.After(20 * time.Second):
		t.Fatal("the agent goes on")
	}
	err := m.stop()
	fmt.Fprintf(told, "%v %+v %#v\n", err, err, err)
	look("banned")
	places["an error"], places["the log"] = told.Bytes(), []byte(strings.Join(m.log.lines(), ""))

	for _, needed := range []string{"while serving svids.sealed", "stopped svids.sealed", "while serving bundle.json", "metrics", "an error", "the log"} {
		if len(places[needed]) == 0 {
			t.Errorf("nothing to look at: %s", needed)
		}
	}
	for name, secret := range secrets {
		for place, content := range places {
			if strings.HasPrefix(name, "the agent's key") && strings.HasSuffix(place, " identity.json") {
				continue
			}
			if form := shows(content, secret); form != "" {
				t.Errorf("%s shows %s %s", place, name, form)
			}
		}
	}
}
