package reference

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// Reason is one reason code with one kind.
type Reason struct {
	Code  string
	Kind  fault.Kind
	Texts []string // what it says, with … for what changes
	Rooms []string // packages that make it
}

// Maker says which parameters of a function of pkg/fault are kind, reason and
// text.
type Maker struct{ kind, reason, text int }

// Makers are the functions of pkg/fault that make a fault of a kind.
func Makers(root string) (map[string]Maker, error) {
	names, err := filepath.Glob(filepath.Join(root, "pkg/fault/*.go"))
	if err != nil {
		return nil, err
	}
	makers := map[string]Maker{}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			return nil, err
		}
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || !f.Name.IsExported() || f.Recv != nil {
				continue
			}
			names := params(f.Type)
			m := Maker{slices.Index(names, "kind"), slices.Index(names, "reason"), slices.IndexFunc(names, func(s string) bool { return s == "safe" || s == "format" })}
			if m.kind >= 0 && m.reason >= 0 && m.text >= 0 {
				makers[f.Name.Name] = m
			} else if m.kind >= 0 {
				return nil, fmt.Errorf("fault.%s has a kind, and no parameters reason and safe or format", f.Name.Name)
			}
		}
	}
	return makers, nil
}

// Reasons finds the reasons in the source below dirs: all calls that make a
// fault, and through helpers what these are called with. What can't be told is
// an error, so that none is missed.
func Reasons(root string, makers map[string]Maker, dirs ...string) ([]Reason, error) {
	src, err := readSource(root, dirs...)
	if err != nil {
		return nil, err
	}
	kinds := kindsByName()
	found := map[[2]string]*Reason{}
	var errs []error
	var calls []*call
	for _, c := range src.calls {
		if name, ok := c.of(src, "pkg/fault"); ok && makers[name] != (Maker{}) {
			calls = append(calls, src.perCaller(c, c.expr.Args[makers[name].reason])...)
		}
	}
	for _, call := range calls {
		name, _ := call.of(src, "pkg/fault")
		args := makers[name]
		codes, err := call.texts(src, args.reason)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if codes == nil { // handed on: it is listed where it is made
			continue
		}
		names, err := call.names(src, args.kind)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		texts := call.sentences(src, args.text)
		for _, code := range codes {
			for _, kind := range names {
				if kinds[kind] == 0 {
					errs = append(errs, fmt.Errorf("%s: no kind %s", src.position(call.expr), kind))
					continue
				}
				key := [2]string{code, kind}
				if found[key] == nil {
					found[key] = &Reason{Code: code, Kind: kinds[kind]}
				}
				found[key].add(texts, call.room)
			}
		}
	}
	var all []Reason
	for _, r := range found {
		slices.Sort(r.Texts)
		slices.Sort(r.Rooms)
		all = append(all, *r)
	}
	slices.SortFunc(all, func(a, b Reason) int {
		if d := strings.Compare(a.Code, b.Code); d != 0 {
			return d
		}
		return int(a.Kind - b.Kind)
	})
	return all, errors.Join(errs...)
}

func (r *Reason) add(texts []string, room string) {
	for _, text := range texts {
		if !slices.Contains(r.Texts, text) {
			r.Texts = append(r.Texts, text)
		}
	}
	if !slices.Contains(r.Rooms, room) {
		r.Rooms = append(r.Rooms, room)
	}
}

// kindsByName are the kinds as the source writes them: NotFound.
func kindsByName() map[string]fault.Kind {
	kinds := map[string]fault.Kind{}
	for k := fault.Kind(1); k.Error() != fmt.Sprintf("kind_%d", int(k)); k++ {
		var name strings.Builder
		for _, word := range strings.Split(k.Error(), "_") {
			name.WriteString(strings.ToUpper(word[:1]) + word[1:])
		}
		kinds[name.String()] = k
	}
	return kinds
}

// KindMeanings are the comments of the kinds in pkg/fault.
func KindMeanings(root string) (map[string]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, "pkg/fault/fault.go"), nil, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	meanings := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok && spec.Comment != nil {
			meanings[spec.Names[0].Name] = sentence(spec.Comment.Text())
		}
		return true
	})
	for name := range kindsByName() {
		if meanings[name] == "" {
			return nil, fmt.Errorf("kind %s has no comment that says what its receiver should do", name)
		}
	}
	return meanings, nil
}

// ErrorsPage is the page of all reasons.
func ErrorsPage(meanings map[string]string, reasons []Reason) string {
	var b strings.Builder
	b.WriteString(`# Errors

Every error has a kind, which says what its receiver can do, and a reason, a stable code for scripts. On the command line
and at the end of a daemon it is one line, ` + "`error: <reason>: <text>`" + `, or an object with ` + "`-o json`" + `, and the
exit code is as below. On the wire it is a gRPC status; its details have an ` + "`ErrorInfo`" + ` of domain ` + "`assay`" + ` with
the reason, and a request id that is in the log of the answering program as well. An error of a peer that gives no reason
has its kind for one.

## Kinds

| kind | means | gRPC code | exit code |
|---|---|---|---|
`)
	kinds := kindsByName()
	names := slices.SortedFunc(maps.Keys(kinds), func(a, b string) int { return int(kinds[a] - kinds[b]) })
	for _, name := range names {
		k := kinds[name]
		fmt.Fprintf(&b, "| %s | %s | %s | %d |\n", k.Error(), cell(meanings[name]), fault.Code(k), daemon.ExitCode(fault.New(k, k.Error(), "")))
	}
	b.WriteString("\n## Reasons\n\nEach with its kinds, exit code, who makes it, and what it says; … stands for what differs from case to case.\n")
	for i, r := range reasons {
		if i == 0 || reasons[i-1].Code != r.Code {
			fmt.Fprintf(&b, "\n### %s\n\n", r.Code)
		}
		fmt.Fprintf(&b, "- %s, exit %d, from `%s`", r.Kind.Error(), daemon.ExitCode(fault.New(r.Kind, r.Code, "")), strings.Join(r.Rooms, "`, `"))
		switch texts := worded(r.Texts); len(texts) {
		case 0:
			b.WriteString("\n")
		case 1:
			fmt.Fprintf(&b, ": %s\n", texts[0])
		default:
			b.WriteString(":\n  - " + strings.Join(texts, "\n  - ") + "\n")
		}
	}
	return b.String()
}

// worded leaves out texts that say nothing before it is known what happened.
func worded(texts []string) (kept []string) {
	for _, text := range texts {
		if strings.ContainsFunc(text, unicode.IsLetter) {
			kept = append(kept, cell(text))
		}
	}
	return kept
}

// of returns the name of the function that is called, if it is one of the
// package in dir.
func (c *call) of(src *source, dir string) (string, bool) {
	sel, ok := c.expr.Fun.(*ast.SelectorExpr)
	if !ok {
		return "", false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return sel.Sel.Name, ok && c.file.imports[pkg.Name] == path.Join(module, dir)
}
